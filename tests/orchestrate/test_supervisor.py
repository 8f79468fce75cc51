"""Groups of real Ray actors: errors, deaths, stops and restarts, in one Ray session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import DataError, Interrupted, StageError
from pipeline.layout import RunDir
from pipeline.orchestrate.supervisor import Placement, run_supervised
from pipeline.runtime.dist_env import DistEnv

ROOT = Path(__file__).resolve().parents[2]


def _never() -> bool:
    return False


class Run:
    """Runs an entry in a group of two and remembers what was said."""

    def __init__(self, path: Path) -> None:
        self.placement = Placement(
            "pretrain", processes=2, threads=1, device="cpu", run_dir=RunDir(path)
        )
        self.said: list[str] = []
        self.steps = 0

    def __call__(
        self,
        entry: Callable[[DistEnv, Callable[[], bool]], dict[str, float]],
        stop: Callable[[], bool] = _never,
    ) -> dict[str, float]:
        return run_supervised(
            entry,
            self.placement,
            stop=stop,
            tick=lambda: self.steps,
            log=lambda text, level: self.said.append(text),
        )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def _alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_ranks_get_torchruns_environment_and_their_output_goes_to_logs(run: Run) -> None:
    def entry(world: DistEnv, stop: Callable[[], bool]) -> dict[str, float]:
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        total = torch.tensor([world.rank + 1.0])
        dist.all_reduce(total)
        dist.destroy_process_group()
        print(
            "threads",
            torch.get_num_threads(),
            os.environ["LOCAL_RANK"],
            os.environ["DS_ACCELERATOR"],
        )
        return {"sum": total.item(), "rank": world.rank, "size": world.size}

    assert run(entry) == {"sum": 3.0, "rank": 0, "size": 2}
    assert "threads 1 1 cpu" in run.placement.run_dir.log("pretrain", 1).read_text()


def test_an_error_in_one_rank_ends_its_hanging_peer_and_shows_its_traceback(
    run: Run, tmp_path: Path
) -> None:
    def entry(world: DistEnv, stop: Callable[[], bool]) -> dict[str, float]:
        (tmp_path / f"pid{world.rank}").write_text(str(os.getpid()))
        if world.rank == 1:
            while not (tmp_path / "pid0").exists():
                time.sleep(0.05)
            raise ZeroDivisionError("the planted error")
        time.sleep(600)
        return {}

    with pytest.raises(StageError) as caught:
        run(entry)
    message = str(caught.value)
    assert "rank 1 failed" in message
    assert "Traceback" in message
    assert "ZeroDivisionError: the planted error" in message
    assert run.said == []  # an error without any progress is not tried again
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    assert _wait_until(lambda: not _alive(pids), 5)


def test_errors_for_the_user_keep_their_type(run: Run) -> None:
    def entry(world: DistEnv, stop: Callable[[], bool]) -> dict[str, float]:
        if world.rank == 0:
            raise DataError("shard is damaged", place="train-00000.parquet", remedy="prepare again")
        time.sleep(600)
        return {}

    with pytest.raises(
        DataError, match=r"train-00000\.parquet: shard is damaged\n  -> prepare again"
    ):
        run(entry)


def test_a_killed_process_is_replaced_and_blamed_before_its_peers(run: Run, tmp_path: Path) -> None:
    def entry(world: DistEnv, stop: Callable[[], bool]) -> dict[str, float]:
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        if world.generation == 0 and world.rank == 1:
            print("about to die", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))
        return {"generation": world.generation}

    assert run(entry) == {"generation": 1}
    assert "the process of rank 1 died" in run.said[0]
    assert "| about to die" in run.said[0]


def test_a_crash_loop_ends_after_three_restarts(run: Run) -> None:
    def entry(world: DistEnv, stop: Callable[[], bool]) -> dict[str, float]:
        if world.rank == 0:
            os._exit(9)
        time.sleep(600)
        return {}

    with pytest.raises(StageError, match="4 times without getting any further"):
        run(entry)
    assert len([text for text in run.said if text.startswith("starting the processes again")]) == 3


def test_an_error_after_progress_is_tried_again(run: Run, tmp_path: Path) -> None:
    def entry(world: DistEnv, stop: Callable[[], bool]) -> dict[str, float]:
        if world.generation == 0:
            (tmp_path / "progress").touch()
            time.sleep(1)
            raise RuntimeError("once")
        return {"done": 1.0}

    def tick() -> int:
        return int((tmp_path / "progress").exists())

    assert run_supervised(
        entry, run.placement, stop=_never, tick=tick, log=lambda text, level: None
    ) == {"done": 1.0}


def test_a_stop_request_reaches_all_ranks_and_waits_for_the_slowest(
    run: Run, tmp_path: Path
) -> None:
    def entry(world: DistEnv, stop: Callable[[], bool]) -> dict[str, float]:
        (tmp_path / f"running{world.rank}").touch()
        while not stop():
            time.sleep(0.02)
        if world.rank == 0:
            time.sleep(2)  # writes its checkpoint while rank 1 is done already
            (tmp_path / "checkpoint").touch()
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        run(
            entry,
            stop=lambda: (tmp_path / "running0").exists() and (tmp_path / "running1").exists(),
        )
    assert (tmp_path / "checkpoint").exists()


def test_nothing_outlives_a_killed_driver(tmp_path: Path) -> None:
    driver = textwrap.dedent(
        """
        import os, pathlib, sys, time
        from pipeline.layout import RunDir
        from pipeline.orchestrate.ray_session import ray_session
        from pipeline.orchestrate.supervisor import Placement, run_supervised

        folder = pathlib.Path(sys.argv[1])

        def entry(world, stop):
            (folder / f"pid{world.rank}").write_text(str(os.getpid()))
            time.sleep(600)

        with ray_session(cpus=2, gpus=0, started=lambda: None):
            placement = Placement("pretrain", 2, 1, "cpu", RunDir(folder))
            run_supervised(entry, placement, stop=lambda: False, tick=lambda: 0, log=print)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", driver, str(tmp_path)], cwd=ROOT, start_new_session=True
    )
    files = [tmp_path / f"pid{rank}" for rank in range(2)]
    try:
        assert _wait_until(lambda: all(file.exists() and file.read_text() for file in files), 60)
    finally:
        process.kill()
        process.wait()
    assert _wait_until(lambda: not _alive([int(file.read_text()) for file in files]), 10)
