"""One training process: the Ray actor that lends its process to a stage, and what it reports back.

Ray is not imported here: the class is made an actor by ``workers``, and a stage's function sees a plain process with the
environment that torchrun would give it.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.runtime.dist_env import DistEnv

Entry = Callable[[DistEnv, Callable[[], bool]], dict[str, float]]


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: with metrics, or with an error (its own type if it is meant for the user)."""

    rank: int
    metrics: dict[str, float] = field(default_factory=dict)
    error: PipelineError | None = None
    traceback: str = ""
    at: float = field(default_factory=time.time)  # which rank failed first

    @property
    def failed(self) -> bool:
        return bool(self.traceback)


class Worker:
    """Runs one rank of a stage in this process.

    Args:
        log: file that standard output and standard error of this process go to from now on.
        environment: set before anything heavy is imported.
    """

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        faulthandler.enable()
        os.environ.update(environment)
        self._stop = threading.Event()
        threading.Thread(
            target=_end_with_parent, args=(os.getppid(),), name="watchdog", daemon=True
        ).start()

    def free_port(self) -> int:
        """A port for the rendezvous that is free on this machine now."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port

    def run(self, entry: Entry, environment: dict[str, str]) -> Outcome:
        """Run the stage to its end; errors come back as values, so that their text is whole."""
        os.environ.update(environment)
        world = DistEnv.from_environment()
        try:
            return Outcome(world.rank, metrics=entry(world, self._stop.is_set))
        except PipelineError as error:
            return Outcome(world.rank, error=error, traceback=traceback.format_exc())
        except (
            Exception
        ):  # of any kind: its text is the outcome, with which the driver ends the stage as failed
            return Outcome(world.rank, traceback=traceback.format_exc())

    def request_stop(self) -> None:
        """Make the stage's stop flag true; arrives while ``run`` is under way."""
        self._stop.set()


def _end_with_parent(parent: int) -> None:
    # A process whose raylet was killed goes on training otherwise: nothing may outlive its controller.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
