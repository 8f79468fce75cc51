"""A run on this machine, and the processes of its Ray."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass

import psutil

from pipeline.chaos.driver import END_S, Driver

_RANK = "ray::Worker"  # how Ray names the processes of our actors; others are idle, or its own
_KEEPER = "ray_keeper"  # parent of Ray's servers, in a session of its own


@dataclass(kw_only=True)
class LocalDriver(Driver):
    """The command ``run``, which is the driver."""

    keeper: psutil.Process | None = None

    def start(self) -> None:
        """Start it, or start it again to resume."""
        super().start()
        self.keeper = None

    def stop(self) -> int:
        """Ask it to stop, as a scheduler does; returns its exit code."""
        self.send(signal.SIGTERM)
        return self.wait(END_S)

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
