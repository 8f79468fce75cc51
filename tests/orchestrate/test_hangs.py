"""Processes that exist and show no progress: found, named with what they do, started again."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from pipeline.errors import Interrupted, StageError
from pipeline.monitor.goodput import STEP
from pipeline.orchestrate.hang_report import _blamed, look_at
from pipeline.orchestrate.heartbeats import Hang
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.rank_link import Beat, RankLink
from tests.orchestrate.supervised import SupervisedRun, alive, wait_until

TIMEOUT_S = 10.0  # less than this, a busy machine may need for two steps
HANGS_AT = 8  # step
STEPS = 12


class Stage:
    """Twelve steps on two ranks that wait for each other. In the first groups, rank 1 hangs."""

    def __init__(self, folder: Path, kind: str, groups: int = 1) -> None:
        self.folder = folder
        self.kind = kind
        self.groups = groups  # that hang

    def __call__(self, dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        import torch
        import torch.distributed as dist

        (self.folder / f"pid-{dist_env.generation}-{dist_env.rank}").write_text(str(os.getpid()))
        dist.init_process_group("gloo")
        for step in range(1, STEPS + 1):
            hung = len(list(self.folder.glob("hangs-*")))
            if dist_env.rank == 1 and step == HANGS_AT and hung < self.groups:
                (self.folder / f"hangs-{hung}").write_text(str(time.time()))
                self.hang()
            dist.all_reduce(torch.ones(1))
            link.beat(step, STEP)
            time.sleep(0.05)
        dist.destroy_process_group()
        return {"steps": float(STEPS)}

    def hang(self) -> None:
        if self.kind == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            wait_for_a_stuck_disk()

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.folder.glob("pid-*")]


def wait_for_a_stuck_disk() -> None:
    time.sleep(600)


def supervised(tmp_path: Path, stop_grace_s: float = 60.0) -> SupervisedRun:
    run = SupervisedRun(tmp_path, stop_grace_s=stop_grace_s)
    run.watch_for_hangs(TIMEOUT_S)
    return run


@pytest.mark.usefixtures("ray_workers")
@pytest.mark.parametrize(
    ("kind", "cause"),
    [("stopped", "is stopped by a signal"), ("waiting", "wait_for_a_stuck_disk")],
)
def test_a_process_that_hangs_is_named_and_the_group_starts_again(
    tmp_path: Path, kind: str, cause: str
) -> None:
    stage = Stage(tmp_path, kind)
    run = supervised(tmp_path)
    assert run(stage) == {"steps": STEPS}
    (text,) = [text for text in run.messages if "no progress" in text]
    pattern = r"^pretrain: rank 1 \(hang\): no progress for \d+ s \(limit 10 s\)"
    assert re.search(pattern, text), text
    assert re.search(rf"rank 1 \(step \d+, \w+\):\n(  \| .*\n)*  \| .*{cause}", text)
    assert re.search(r"rank 0 .*:\n(  \| .*\n)*  \| all_reduce", text), text
    # Found within three times the limit.
    began = float((tmp_path / "hangs-0").read_text())
    assert run.times[text] - began < 3 * TIMEOUT_S + 5
    assert wait_until(lambda: not alive(stage.pids()), 10)


@pytest.mark.usefixtures("ray_workers")
def test_a_group_that_hangs_again_and_again_ends_the_stage(tmp_path: Path) -> None:
    run = supervised(tmp_path)
    report = r"rank 1 \(hang\): no progress .*\n(.*\n)*.*failed 4 times"
    with pytest.raises(StageError, match=report):
        run(Stage(tmp_path, "stopped", groups=9))


@pytest.mark.usefixtures("ray_workers")
def test_a_stop_request_during_a_hang_ends_the_run_within_the_grace(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "stopped")
    run = supervised(tmp_path, stop_grace_s=2.0)
    asked: list[float] = []

    def stop() -> bool:
        if (tmp_path / "hangs-0").exists():
            asked.append(time.monotonic())
        return bool(asked)

    with pytest.raises(Interrupted, match="no checkpoint was written within 2 s"):
        run(stage, stop=stop)
    assert time.monotonic() - asked[0] < 10
    assert wait_until(lambda: not alive(stage.pids()), 10)


def beats(*steps: int) -> Hang:
    return Hang(
        silent_s=9,
        limit_s=5,
        beats={rank: Beat(count=step, step=step, phase=STEP) for rank, step in enumerate(steps)},
    )


def test_the_rank_that_the_others_wait_for_is_named() -> None:
    waits = ("all_reduce (torch/distributed/c10d.py:1)", "step (engine.py:2)")
    computes = ("mm (functions.py:4)", "step (engine.py:2)")
    reads = ("read (loader.py:3)",)
    # 1. One that does not answer.
    assert _blamed(beats(7, 7, 7), {0: waits, 2: waits}, [1]) == [1]
    # 2. One that is behind.
    assert _blamed(beats(8, 7, 8), dict.fromkeys(range(3), waits), []) == [1]
    # 3. One that does not wait for the others.
    assert _blamed(beats(7, 7), {0: waits, 1: reads}, []) == [1]
    # 4. One that is elsewhere.
    assert _blamed(beats(7, 7, 7), {0: computes, 1: reads, 2: computes}, []) == [1]
    # 5. Nobody knows.
    assert _blamed(beats(7, 7), {0: computes, 1: reads}, []) == [0, 1]


def test_a_process_that_has_ended_is_named() -> None:
    assert look_at(2**22 + 1) == ("its process has ended",)
