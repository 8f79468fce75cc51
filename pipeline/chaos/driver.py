"""A run as a user starts it, in a process of its own: its processes, and how far it is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipeline.layout import RunDir
from pipeline.monitor.events import Follower

_POLL_S = 0.2
_RANK = "ray::Worker"  # how Ray names the processes of our actors; others are idle, or its own
_KEEPER = "ray_keeper"  # parent of Ray's servers, in a session of its own


@dataclass(kw_only=True)
class Driver:
    """The command ``run``, started as often as needed.

    Attributes:
        arguments: of the command, after ``run``.
        stages: the training stages.
        log: file of its output.
    """

    arguments: Sequence[str]
    run_dir: RunDir
    stages: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    keeper: psutil.Process | None = None
    starts: int = 0
    _events: dict[str, Follower] = field(default_factory=dict)
    _steps: dict[str, int] = field(default_factory=dict)  # by stage: of the newest event
    reached: int = 0  # steps of all stages, at most so far

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
        self.keeper = None

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        assert self.process is not None
        return self.process.poll()

    def wait(self, seconds: float) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        assert self.process is not None
        return self.process.wait(seconds)

    def end(self) -> None:
        """End it now, unless it has ended. Its keeper ends Ray's processes after it."""
        if self.process is not None and self.code is None:
            self.left_processes()  # remembers whose processes must end
            self.process.kill()
            self.process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the driver alone."""
        assert self.process is not None
        os.kill(self.process.pid, number)

    def ranks(self) -> list[psutil.Process]:
        """The processes that train now."""
        return [process for process in self._of_ray() if _title(process).startswith(_RANK)]

    def server(self, name: str) -> psutil.Process | None:
        """A server of Ray, such as "raylet"."""
        return next((process for process in self._of_ray() if _name(process) == name), None)

    def left_processes(self) -> list[psutil.Process]:
        """What is left of the run: nothing, some time after its end."""
        return self._of_ray()

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

    def _of_ray(self) -> list[psutil.Process]:
        """The keeper of Ray's processes and all below it."""
        if self.keeper is None:
            assert self.process is not None
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(self.process.pid).children()
                self.keeper = next((child for child in children if _KEEPER in _title(child)), None)
        if self.keeper is None:
            return []
        # All of them are in the session that their parent leads, also after that has ended.
        session = self.keeper.pid
        return [process for process in psutil.process_iter() if _session(process) == session]


def _heed_stop_requests() -> None:
    """Under `nohup`, or in the background of a script, `chaos` has inherited signals to ignore."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return str(process.name())
    return ""


def _session(process: psutil.Process) -> int:
    with contextlib.suppress(OSError):
        return os.getsid(process.pid)
    return 0
