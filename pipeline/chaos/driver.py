"""A run as a user starts it, by a command in a process of its own, and how far it is."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipeline.layout import RunDir
from pipeline.monitor.events import Follower

END_S = 300.0  # of a driver that was asked to stop, or whose Ray was lost
_POLL_S = 0.2


@dataclass(kw_only=True)
class Driver(ABC):
    """The command ``run``, started as often as needed.

    Attributes:
        arguments: of the command, after ``run``.
        run_dir: as this machine sees it.
        stages: the training stages.
        log: file of its output.
    """

    arguments: Sequence[str]
    run_dir: RunDir
    stages: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    _events: dict[str, Follower] = field(default_factory=dict)
    _steps: dict[str, int] = field(default_factory=dict)  # by stage: of the newest event
    reached: int = 0  # steps of all stages, at most so far

    @abstractmethod
    def stop(self) -> int:
        """Ask the run to stop and wait for its end; returns the exit code of the command."""

    @abstractmethod
    def end(self) -> None:
        """End the run now, unless it has ended."""

    @abstractmethod
    def left_processes(self) -> list[psutil.Process]:
        """What this machine has of the run: nothing, some time after its end."""

    def start(self) -> None:
        """Start it, or start it again to resume."""
        self.starts += 1
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline", "run", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Signals to the terminal of `chaos` are for `chaos`.
                start_new_session=True,
                preexec_fn=_heed_stop_requests,
            )

    @property
    def code(self) -> int | None:
        """The exit code of the command; None while it runs."""
        assert self.process is not None
        return self.process.poll()

    def wait(self, seconds: float) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        assert self.process is not None
        return self.process.wait(seconds)

    def poll(self) -> int:
        """Steps of all training stages that were logged; it may go back."""
        for stage in self.stages:
            follower = self._events.setdefault(stage, Follower(self.run_dir.events(stage)))
            for event in follower.poll():
                if event.kind in ("start", "step"):
                    self._steps[stage] = event.step
        # After a restart the log shows earlier steps again: progress is what exceeds the highest.
        present = sum(self._steps.values())
        self.reached = max(self.reached, present)
        return present

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """True once the condition is; False when the driver or the time ends before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.poll()
            if condition():
                return True
            if self.code is not None:
                return condition()
            time.sleep(_POLL_S)
        return False


def _heed_stop_requests() -> None:
    """Under `nohup`, or in the background of a script, `chaos` has inherited signals to ignore."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
