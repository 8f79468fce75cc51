"""Groups of real Ray actors: environment, errors, deaths and restarts, in one Ray session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import command
from pipeline.errors import DataError, Interrupted, StageError
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.rank_link import RankLink
from tests.orchestrate.supervised import SupervisedRun, alive, wait_until

pytestmark = pytest.mark.usefixtures("ray_workers")
ROOT = Path(__file__).resolve().parents[2]
STANDBY_S = 25  # until processes that stand by have imported everything


@pytest.fixture
def run(tmp_path: Path) -> SupervisedRun:
    return SupervisedRun(tmp_path)


def test_ranks_have_the_environment_of_torchrun_and_a_log_each(run: SupervisedRun) -> None:
    def stage_fn(dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        total = torch.tensor([dist_env.rank + 1.0])
        dist.all_reduce(total)
        dist.destroy_process_group()
        print(
            "threads",
            torch.get_num_threads(),
            os.environ["LOCAL_RANK"],
            os.environ["LOCAL_SIZE"],
            os.environ["DS_ACCELERATOR"],
        )
        return {"sum": total.item(), "rank": dist_env.rank, "size": dist_env.size}

    assert run(stage_fn) == {"sum": 3.0, "rank": 0, "size": 2}
    assert "threads 1 1 2 cpu" in run.placement.log(1).read_text()


def test_remedies_of_workers_name_the_command_of_the_user(
    run: SupervisedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(command.VARIABLE, "./launch.sh")

    def stage_fn(dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        raise DataError("shard is damaged", remedy=command.command("verify", "runs/a"))

    with pytest.raises(DataError, match=r"  -> \./launch\.sh verify runs/a$"):
        run(stage_fn)


def test_an_error_in_one_rank_ends_its_hanging_peer_and_shows_its_traceback(
    run: SupervisedRun, tmp_path: Path
) -> None:
    def stage_fn(dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        (tmp_path / f"pid{dist_env.rank}").write_text(str(os.getpid()))
        if dist_env.rank == 1:
            while not (tmp_path / "pid0").exists():
                time.sleep(0.05)
            raise ZeroDivisionError("the planted error")
        time.sleep(600)
        return {}

    with pytest.raises(StageError) as caught:
        run(stage_fn)
    message = str(caught.value)
    assert "rank 1 failed" in message
    assert "Traceback" in message
    assert "ZeroDivisionError: the planted error" in message
    assert run.messages == []  # an exception before any progress is not retried
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    assert wait_until(lambda: not alive(pids), 5)


def test_errors_for_the_user_keep_their_type(run: SupervisedRun) -> None:
    def stage_fn(dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        if dist_env.rank == 0:
            raise DataError("shard is damaged", place="train-00000.parquet", remedy="prepare again")
        time.sleep(600)
        return {}

    with pytest.raises(
        DataError, match=r"train-00000\.parquet: shard is damaged\n  -> prepare again"
    ):
        run(stage_fn)


def test_a_killed_process_is_replaced_and_reported_before_its_peers(run: SupervisedRun) -> None:
    def stage_fn(dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        if dist_env.generation == 0 and dist_env.rank == 1:
            print("about to die", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))
        assert dist_env.generation is not None
        return {"generation": dist_env.generation}

    assert run(stage_fn) == {"generation": 1}
    assert "the process of rank 1 died" in run.messages[0]
    assert "| about to die" in run.messages[0]


def test_processes_that_stand_by_replace_those_that_fail(
    run: SupervisedRun, tmp_path: Path
) -> None:
    """They were there before the failure, and others do so for them."""
    run.placement = replace(run.placement, standby_after_s=0.5)

    def stage_fn(dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        import psutil

        if dist_env.generation == 2:
            return {"done": 1.0}
        born = psutil.Process().create_time()
        (tmp_path / f"born-{dist_env.generation}-{dist_env.rank}").write_text(str(born))
        if dist_env.rank == 1:
            time.sleep(STANDBY_S)
            (tmp_path / f"killed-{dist_env.generation}").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
        return {}

    assert run(stage_fn) == {"done": 1.0}
    killed = float((tmp_path / "killed-0").read_text())
    born = [float((tmp_path / f"born-1-{rank}").read_text()) for rank in range(2)]
    assert max(born) < killed


def test_a_process_whose_group_was_replaced_ends_itself(run: SupervisedRun) -> None:
    """As on a machine that is cut off: nobody can end it, but it sees the file."""
    fence = run.placement.fence

    def stage_fn(dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        assert dist_env.generation is not None
        if dist_env.generation == 0:
            fence.write_text("7")
            time.sleep(600)
        return {"generation": dist_env.generation}

    assert run(stage_fn) == {"generation": 8}
    assert "process group 0 was replaced by 7" in run.placement.log(0).read_text()


def test_a_call_after_a_crash_loop_tries_once(run: SupervisedRun) -> None:
    def stage_fn(dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        if dist_env.rank == 0:
            os._exit(9)
        time.sleep(600)
        return {}

    run.failures = 4
    with pytest.raises(StageError, match="failed 4 times without progress"):
        run(stage_fn)
    assert [text for text in run.messages if text.startswith("restarting the processes")] == []
    # With progress, it has all its restarts again.
    steps = iter([0, *range(1, 100)])
    with pytest.raises(Interrupted):
        run(stage_fn, stop=lambda: len(run.messages) > 8, highest_step=lambda: next(steps))
    assert run.failures == 0


def test_a_crash_loop_ends_after_three_restarts(run: SupervisedRun) -> None:
    def stage_fn(dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        if dist_env.rank == 0:
            os._exit(9)
        time.sleep(600)
        return {}

    with pytest.raises(StageError, match="failed 4 times without progress"):
        run(stage_fn)
    restarts = [text for text in run.messages if text.startswith("restarting the processes")]
    assert len(restarts) == 3


def test_an_error_after_progress_is_retried(run: SupervisedRun, tmp_path: Path) -> None:
    def stage_fn(dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        if dist_env.generation == 0:
            (tmp_path / "progress").touch()
            time.sleep(1)
            raise RuntimeError("once")
        return {"done": 1.0}

    def highest_step() -> int:
        return int((tmp_path / "progress").exists())

    assert run(stage_fn, highest_step=highest_step) == {"done": 1.0}


def test_nothing_outlives_a_killed_driver(tmp_path: Path) -> None:
    driver = textwrap.dedent(
        """
        import os, pathlib, sys, time
        from pipeline.orchestrate.ray_session import ray_session
        from tests.orchestrate.supervised import SupervisedRun

        folder = pathlib.Path(sys.argv[1])

        def stage_fn(dist_env, link):
            (folder / f"pid{dist_env.rank}").write_text(str(os.getpid()))
            time.sleep(600)

        with ray_session(cpus=2, gpus=0):
            SupervisedRun(folder)(stage_fn)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", driver, str(tmp_path)], cwd=ROOT, start_new_session=True
    )
    files = [tmp_path / f"pid{rank}" for rank in range(2)]
    try:
        assert wait_until(lambda: all(file.exists() and file.read_text() for file in files), 60)
    finally:
        process.kill()
        process.wait()
    assert wait_until(lambda: not alive([int(file.read_text()) for file in files]), 10)
