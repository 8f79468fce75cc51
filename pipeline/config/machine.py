"""What this machine has, and what 'auto' means on it."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
from pathlib import Path

from pipeline.config.schema import ClusterConfig

CPU_PROCESSES = 2
MAX_LOADER_THREADS = 16


@functools.cache
def gpus() -> int:
    """CUDA devices that this process may use (the driver's count heeds CUDA_VISIBLE_DEVICES); 0 where torch is CPU-only."""
    try:
        if "+cpu" in importlib.metadata.version("torch"):
            return 0
        driver = ctypes.CDLL("libcuda.so.1")
    except (importlib.metadata.PackageNotFoundError, OSError):
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


@functools.cache
def cores() -> int:
    """CPU cores that this process may use: its affinity, and a container's quota where one is set."""
    available = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(available, int(quota) // int(period)))
    except (OSError, ValueError):
        return available


def device(cluster: ClusterConfig) -> str:
    """'cpu' or 'cuda'; for 'auto' cuda where there is a device."""
    if cluster.device != "auto":
        return cluster.device
    return "cuda" if gpus() else "cpu"


def world_size(cluster: ClusterConfig) -> int:
    """Training processes; for 'auto' one a GPU, or two on the CPU."""
    if cluster.processes != "auto":
        return cluster.processes
    return max(1, gpus()) if device(cluster) == "cuda" else CPU_PROCESSES


def threads(cluster: ClusterConfig) -> int:
    """Compute threads of each process."""
    return cluster.threads if cluster.threads != "auto" else max(1, cores() // world_size(cluster))


def loader_threads(cluster: ClusterConfig) -> int:
    """Image decoding threads of each process."""
    if cluster.loader_threads != "auto":
        return cluster.loader_threads
    return min(MAX_LOADER_THREADS, max(1, cores() // world_size(cluster)))
