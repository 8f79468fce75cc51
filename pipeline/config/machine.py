"""Hardware of this machine, and the values that 'auto' stands for on it."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import ClusterConfig

CPU_PROCESSES = 2  # two, so that a run on a laptop exercises the same collectives as a cluster
MAX_LOADER_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What the checks of a job need to know of the machine. Data, so that tests simulate GPUs.

    Attributes:
        device: cpu or cuda.
        device_bytes: memory of the smallest GPU; None on a CPU.
        driver_cuda: newest CUDA version that the GPU driver supports: (12, 4); None without one.
        torch_cuda: CUDA version that torch was built for; None for a CPU build.
        missing_compiler: what torch.compile lacks on this device; empty if it can compile.
    """

    device: str
    device_bytes: float | None = None
    driver_cuda: tuple[int, int] | None = None
    torch_cuda: tuple[int, int] | None = None
    missing_compiler: str = ""


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """The GPU driver's library; None without a usable device, or if torch is a CPU build."""
    # Ask the driver and not torch: importing torch takes seconds, which a dry run must not cost.
    try:
        if "+cpu" in importlib.metadata.version("torch"):
            return None
        driver = ctypes.CDLL("libcuda.so.1")
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None
    # cuInit fails without a usable device, for example in a container without access to one.
    return driver if driver.cuInit(0) == 0 else None


@functools.cache
def gpus() -> int:
    """Number of CUDA devices that this process may use; 0 if torch is a CPU build.

    The count heeds CUDA_VISIBLE_DEVICES.
    """
    driver = _driver()
    count = ctypes.c_int(0)
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def hardware(cluster: ClusterConfig) -> Hardware:
    """The machines on which a job runs.

    Those of a cluster cannot be asked from here: their checks come before the first stage.
    """
    if cluster.kind != "local":
        bytes_of = None if cluster.device_gib is None else cluster.device_gib * 2**30
        return Hardware(
            device=device(cluster),
            device_bytes=bytes_of if device(cluster) == "cuda" else None,
        )
    if device(cluster) == "cpu":
        return Hardware(device="cpu", missing_compiler=_missing_cpp_compiler())
    return Hardware(
        device="cuda",
        device_bytes=_smallest_device(),
        driver_cuda=_driver_cuda(),
        torch_cuda=_torch_cuda(),
        missing_compiler=_missing_c_compiler(),
    )


def _smallest_device() -> float | None:
    driver = _driver()
    sizes = []
    for number in range(gpus()):
        handle = ctypes.c_int(0)
        size = ctypes.c_size_t(0)
        if (
            driver is not None
            and driver.cuDeviceGet(ctypes.byref(handle), number) == 0
            and driver.cuDeviceTotalMem_v2(ctypes.byref(size), handle) == 0
        ):
            sizes.append(float(size.value))
    return min(sizes, default=None)


def _driver_cuda() -> tuple[int, int] | None:
    driver = _driver()
    version = ctypes.c_int(0)
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    # 12040 is CUDA 12.4.
    return version.value // 1000, version.value % 1000 // 10


def _torch_cuda() -> tuple[int, int] | None:
    """The CUDA version in torch/version.py, read as text: an import would take seconds."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        text = (Path(folder) / "version.py").read_text(encoding="utf-8")
        version = re.search(r"^cuda\b.*=\s*'(\d+)\.(\d+)", text, re.MULTILINE)
        if version:
            return int(version[1]), int(version[2])
    return None


def _missing_c_compiler() -> str:
    """What Triton lacks: it compiles a C launcher, with Python's headers, for every kernel."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"a C compiler ({' or '.join(compilers)})"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return "" if headers.is_file() else f"the headers of Python ({headers})"


def _missing_cpp_compiler() -> str:
    compiler = os.environ.get("CXX", "g++")
    return "" if shutil.which(compiler) else f"a C++ compiler ({compiler})"


@functools.cache
def cores() -> int:
    """Number of CPU cores that this process may use: its affinity, and a container's quota."""
    available = len(os.sched_getaffinity(0))
    return max(1, min(available, _quota(Path("/sys/fs/cgroup")) or available))


def _quota(cgroups: Path) -> int | None:
    """Cores that a container's quota allows; None without one."""
    try:
        # cgroup v2: "200000 100000" is 200 ms of CPU time per 100 ms, 2 cores; "max" is no quota.
        if (cgroups / "cpu.max").exists():
            quota, period = (cgroups / "cpu.max").read_text().split()
        else:  # v1: two files; -1 is no quota
            quota = (cgroups / "cpu/cpu.cfs_quota_us").read_text()
            period = (cgroups / "cpu/cpu.cfs_period_us").read_text()
        return int(quota) // int(period) if int(quota) > 0 else None
    except (OSError, ValueError):
        return None


def device(cluster: ClusterConfig) -> str:
    """'cpu' or 'cuda'; 'auto' means cuda if there is a device."""
    if cluster.device != "auto":
        return cluster.device
    return "cuda" if gpus() else "cpu"


def world_size(cluster: ClusterConfig) -> int:
    """Number of training processes; 'auto' means one per GPU, or two on the CPU.

    On a cluster it follows from the file alone: 8 nodes with 8 devices each -> 64.
    """
    if cluster.kind != "local":
        return cluster.nodes * cluster.devices_per_node
    if cluster.processes != "auto":
        return cluster.processes
    return max(1, gpus()) if device(cluster) == "cuda" else CPU_PROCESSES


def threads(cluster: ClusterConfig, local_size: int) -> int:
    """Compute threads per process. Example: 16 cores and 4 processes on this machine -> 4."""
    return cluster.threads if cluster.threads != "auto" else max(1, cores() // local_size)


def loader_threads(cluster: ClusterConfig, local_size: int) -> int:
    """Image decoding threads per process. Example: 192 cores, 8 processes here -> 16 (limit)."""
    if cluster.loader_threads != "auto":
        return cluster.loader_threads
    return min(MAX_LOADER_THREADS, max(1, cores() // local_size))
