"""Hardware of this machine, and the values that 'auto' stands for on it."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
from pathlib import Path

from pipeline.config.schema import ClusterConfig

CPU_PROCESSES = 2  # two, so that a run on a laptop exercises the same collectives as a cluster
MAX_LOADER_THREADS = 16


@functools.cache
def gpus() -> int:
    """Number of CUDA devices that this process may use; 0 if torch is a CPU build.

    The count heeds CUDA_VISIBLE_DEVICES.
    """
    # Ask the driver and not torch: importing torch takes seconds, which a dry run must not cost.
    try:
        if "+cpu" in importlib.metadata.version("torch"):
            return 0
        driver = ctypes.CDLL("libcuda.so.1")
    except (importlib.metadata.PackageNotFoundError, OSError):
        return 0
    # cuInit fails without a usable device, for example in a container without access to one.
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


@functools.cache
def cores() -> int:
    """Number of CPU cores that this process may use: its affinity, and a container's quota."""
    available = len(os.sched_getaffinity(0))
    try:
        # cgroup v2: "200000 100000" is 200 ms of CPU time per 100 ms, 2 cores; "max" is no quota.
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(available, int(quota) // int(period)))
    except (OSError, ValueError):
        return available


def device(cluster: ClusterConfig) -> str:
    """'cpu' or 'cuda'; 'auto' means cuda if there is a device."""
    if cluster.device != "auto":
        return cluster.device
    return "cuda" if gpus() else "cpu"


def world_size(cluster: ClusterConfig) -> int:
    """Number of training processes; 'auto' means one per GPU, or two on the CPU."""
    if cluster.processes != "auto":
        return cluster.processes
    return max(1, gpus()) if device(cluster) == "cuda" else CPU_PROCESSES


def threads(cluster: ClusterConfig) -> int:
    """Compute threads per process. Example: 16 cores and 4 processes -> 4."""
    return cluster.threads if cluster.threads != "auto" else max(1, cores() // world_size(cluster))


def loader_threads(cluster: ClusterConfig) -> int:
    """Image decoding threads per process. Example: 192 cores and 8 processes -> 16 (limit)."""
    if cluster.loader_threads != "auto":
        return cluster.loader_threads
    return min(MAX_LOADER_THREADS, max(1, cores() // world_size(cluster)))
