"""Each class of failure, provoked once: its name, the rank, and what follows."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import DataError, StageError
from pipeline.orchestrate.failure_class import (
    DEVICE,
    MACHINE,
    PROCESS,
    class_of_death,
    class_of_exception,
)
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.rank_link import RankLink
from tests.cluster.debian import unavailable
from tests.orchestrate.supervised import SupervisedRun

LIMIT = 256 << 20  # bytes, of a process that runs out of memory
CONTROL = Path("/sys/fs/cgroup/memory")  # cgroup v1
UNIFIED = Path("/sys/fs/cgroup")


def device() -> None:
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered")


def memory() -> None:
    raise MemoryError("std::bad_alloc")


def storage() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), "train-00003.parquet")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crashed() -> None:
    os._exit(9)


@pytest.mark.usefixtures("ray_workers")
@pytest.mark.parametrize(
    ("fails", "name", "text"),
    [
        (device, "device", "uncorrectable ECC"),
        (memory, "memory", "bad_alloc"),
        (storage, "storage", "train-00003.parquet"),
        (killed, "process", "died"),
        (crashed, "process", "died"),
    ],
)
def test_a_failure_that_may_pass_is_named_and_a_new_group_starts(
    tmp_path: Path, fails: Callable[[], None], name: str, text: str
) -> None:
    def stage_fn(dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        if dist_env.generation == 0 and dist_env.rank == 1:
            fails()
        if dist_env.generation == 0:
            time.sleep(600)
        return {"done": 1.0}

    run = SupervisedRun(tmp_path)
    assert run(stage_fn) == {"done": 1.0}
    assert re.search(rf"rank 1 (died|failed) \({name}\)", run.messages[0]), run.messages
    assert text in run.messages[0]
    # Ray suspects lack of memory of every process that dies.
    assert "common causes" not in run.messages[0]


@pytest.mark.usefixtures("ray_workers")
def test_a_process_that_lacked_memory_is_no_killed_process(
    tmp_path: Path,
) -> None:
    def stage_fn(dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        if dist_env.generation == 0 and dist_env.rank == 1:
            (group / "cgroup.procs").write_text(str(os.getpid()))
            blocks = [os.urandom(1 << 20) for _ in range(2 * LIMIT >> 20)]
            return {"blocks": len(blocks)}
        if dist_env.generation == 0:
            time.sleep(600)
        return {"done": 1.0}

    with limited_group() as group:
        run = SupervisedRun(tmp_path)
        assert run(stage_fn) == {"done": 1.0}
    assert "rank 1 died (memory)" in run.messages[0]
    assert "cluster.prefetch_mib" in run.messages[0]


@pytest.mark.usefixtures("ray_workers")
def test_an_error_of_the_data_or_of_the_program_ends_the_stage_at_once(tmp_path: Path) -> None:
    def damaged(dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        raise DataError("shard is damaged", place="train-00000.parquet")

    def wrong(dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        raise KeyError("weight")

    run = SupervisedRun(tmp_path)
    with pytest.raises(DataError, match="shard is damaged"):
        run(damaged)
    with pytest.raises(StageError, match=r"rank \d failed \(program\)"):
        run(wrong)
    assert not run.messages


def test_messages_of_devices_and_lost_machines_are_recognised() -> None:
    for text in (
        "torch.AcceleratorError: CUDA error: unspecified launch failure",
        "NCCL error in: ProcessGroupNCCL.cpp:2417, unhandled cuda error: ncclUnhandledCudaError",
        "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus",
    ):
        assert class_of_exception(text) is DEVICE
        assert class_of_death(
            f"Worker exit type: SYSTEM_ERROR\n  | {text}", out_of_memory=False
        ) is (DEVICE)
    lost = "The actor died because its node was terminated unexpectedly"
    assert class_of_death(lost, out_of_memory=False) is MACHINE
    # Ray's text about any lost process names the most common cause.
    ray = "Worker exit detail: (1) the process is killed by the OOM killer due to high memory usage"
    assert class_of_death(ray, out_of_memory=False) is PROCESS


@contextlib.contextmanager
def limited_group() -> Iterator[Path]:
    """A control group whose processes may have ``LIMIT`` bytes of memory."""
    is_v1 = CONTROL.is_dir()
    group = (CONTROL if is_v1 else UNIFIED) / f"pipeline-tests-{os.getpid()}"
    try:
        group.mkdir()
        limit = "memory.limit_in_bytes" if is_v1 else "memory.max"
        (group / limit).write_text(str(LIMIT))
    except OSError as error:
        unavailable(f"no control group with a limit can be made: {error}")
    try:
        yield group
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)
