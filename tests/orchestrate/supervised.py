"""Runs stage functions in supervised groups of two processes, and looks after their processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline.layout import RunDir
from pipeline.orchestrate.placement import Placement
from pipeline.orchestrate.supervisor import Watch, run_supervised
from pipeline.orchestrate.worker import StageFn


def never() -> bool:
    return False


class SupervisedRun:
    """Runs a stage function in a group of two processes and keeps the messages for the user."""

    def __init__(self, path: Path, stage: str = "pretrain", stop_grace_s: float = 600.0) -> None:
        self.placement = Placement(
            stage=stage,
            processes=2,
            threads=1,
            device="cpu",
            run_dir=RunDir(path),
            stop_grace_s=stop_grace_s,
        )
        self.failures = 0  # of earlier calls; then as recorded by this one
        self.messages: list[str] = []
        self.times: dict[str, float] = {}  # when each message came

    def watch_for_hangs(self, timeout_s: float) -> None:
        self.placement = replace(self.placement, hang_timeout_s=timeout_s)

    def __call__(
        self,
        stage_fn: StageFn,
        stop: Callable[[], bool] = never,
        highest_step: Callable[[], int] = lambda: 0,
    ) -> dict[str, float]:
        watch = Watch(
            stop=stop,
            poll=highest_step,
            check=lambda: None,
            log=self._log,
            failures=self.failures,
            count_failures=self._count,
        )
        return run_supervised(stage_fn, self.placement, watch)

    def _count(self, failures: int) -> None:
        self.failures = failures

    def _log(self, text: str, level: str = "info") -> None:
        self.messages.append(text)
        self.times[text] = time.time()


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """True once the condition is, False after the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
