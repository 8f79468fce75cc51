"""Drivers and compilers that a job needs are checked before anything starts. Simulated."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config import machine
from pipeline.config.check import check
from pipeline.config.load import load_job
from pipeline.config.machine import Hardware
from pipeline.config.schema import ClusterConfig
from pipeline.errors import ConfigError
from tests.config.jobs import JOB, write

GPU = ClusterConfig(device="cuda")


def refusal(folder: Path, hardware: Hardware, *overrides: str) -> str:
    loaded = load_job(write(folder, JOB), overrides)
    with pytest.raises(ConfigError) as error:
        check(loaded.job, 2, loaded.origins, hardware=hardware)
    assert error.value.exit_code == 2
    return error.value.message


def accept(folder: Path, hardware: Hardware, *overrides: str) -> None:
    loaded = load_job(write(folder, JOB), overrides)
    check(loaded.job, 2, loaded.origins, hardware=hardware)


def test_a_driver_older_than_torch_is_named(tmp_path: Path) -> None:
    old = Hardware(device="cuda", driver_cuda=(12, 4), torch_cuda=(13, 0))
    assert refusal(tmp_path, old) == (
        "configs/cluster/local.yaml:3: cluster.device: the GPU driver supports CUDA 12.4, and "
        "torch is built for CUDA 13.0\n  -> update the driver, or device: cpu"
    )
    accept(tmp_path, Hardware(device="cuda", driver_cuda=(13, 0), torch_cuda=(13, 2)))


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    without = Hardware(device="cuda", missing_compiler="a C compiler (gcc or clang)")
    message = refusal(tmp_path, without, "model.compile=true")
    assert (
        "model.compile: torch.compile needs a C compiler (gcc or clang), which is not " in message
    )
    assert message.endswith("-> install it, or compile: false")
    # Not compiling the levels is not enough: reversible columns compile their kernels on a GPU.
    message = refusal(tmp_path, without)
    assert "model.activations: reversible columns compile their kernels for the GPU" in message
    accept(tmp_path, without, "model.activations=stored")
    on_cpu = Hardware(device="cpu", missing_compiler="a C++ compiler (g++)")
    assert "needs a C++ compiler (g++)" in refusal(tmp_path, on_cpu, "model.compile=true")
    accept(tmp_path, on_cpu)


class Driver:
    """The CUDA driver of a machine with GPUs of these sizes (bytes)."""

    def __init__(self, *sizes: int, version: int = 12040) -> None:
        self.sizes = sizes
        self.version = version

    def cuDeviceGetCount(self, count: object) -> int:
        return self._write(count, len(self.sizes))

    def cuDeviceGet(self, handle: object, number: int) -> int:
        return self._write(handle, number)

    def cuDeviceTotalMem_v2(self, size: object, handle: ctypes.c_int) -> int:
        return self._write(size, self.sizes[handle.value])

    def cuDriverGetVersion(self, version: object) -> int:
        return self._write(version, self.version)

    def _write(self, target: object, value: int) -> int:
        target._obj.value = value  # type: ignore[attr-defined]  # of ctypes.byref
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    machine.gpus.cache_clear()
    monkeypatch.setattr(machine, "_driver", lambda: Driver(80 << 30, 40 << 30))


def test_the_driver_is_asked_for_the_smallest_gpu(
    driver: None, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(machine.gpus.cache_clear)
    hardware = machine.hardware(GPU)
    assert hardware.device_bytes == 40 << 30
    assert hardware.driver_cuda == (12, 4)
    assert machine.gpus() == 2


@pytest.mark.parametrize(
    ("line", "version"),
    [("cuda: Optional[str] = '13.0'", (13, 0)), ("cuda: Optional[str] = None", None)],
)
def test_the_cuda_version_of_torch_is_read_without_importing_it(
    line: str,
    version: tuple[int, int] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\n")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert machine._torch_cuda() == version


def test_a_compiler_is_looked_for_where_triton_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("CXX", "no-such-c++")
    assert machine.hardware(GPU).missing_compiler == "a C compiler (no-such-compiler)"
    on_cpu = machine.hardware(ClusterConfig(device="cpu"))
    assert on_cpu.missing_compiler == "a C++ compiler (no-such-c++)"
    monkeypatch.setenv("CC", "sh")  # found
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    assert machine.hardware(GPU).missing_compiler.startswith("the headers of Python")
    (tmp_path / "Python.h").touch()
    assert machine.hardware(GPU).missing_compiler == ""
