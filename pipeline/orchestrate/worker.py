"""The Ray actor that runs one rank of a stage, and the outcome that it reports.

This module does not import Ray: ``worker_group`` turns the class into an actor. The function of a
stage sees a plain process with the environment that torchrun would give it.
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

# Runs one rank. Arguments: its coordinates, and a function that is true after a stop request.
# Returns the metrics of the stage.
StageFn = Callable[[DistEnv, Callable[[], bool]], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a rank ended: with metrics, or with the traceback of an exception.

    ``error`` is the exception itself if its message is meant for the user, else None.
    """

    rank: int
    metrics: dict[str, float] = field(default_factory=dict)
    error: PipelineError | None = None
    traceback: str = ""
    ended_at: float = field(default_factory=time.time)  # orders failures: the first is the cause

    @property
    def failed(self) -> bool:
        return bool(self.traceback)


class Worker:
    """Runs one rank of a stage in this process.

    Args:
        log: file that receives standard output and standard error of this process from now on.
        environment: variables to set before torch and DeepSpeed are imported.
    """

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        # Replace the file descriptors, not sys.stdout: C++ code (NCCL, gloo) writes to them
        # directly.
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # A crash in C++ code leaves a stack trace in the log.
        faulthandler.enable()
        os.environ.update(environment)
        self._stop = threading.Event()
        threading.Thread(
            target=_exit_with_parent, args=(os.getppid(),), name="watchdog", daemon=True
        ).start()

    def free_port(self) -> int:
        """Return a port for the rendezvous that is free on this host now."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port

    def run(self, stage_fn: StageFn, environment: dict[str, str]) -> Outcome:
        """Run the stage to its end.

        An exception is returned as a value: Ray would wrap it, and the text of its own would be
        cut.
        """
        os.environ.update(environment)
        dist_env = DistEnv.from_environment()
        rank = dist_env.rank
        try:
            return Outcome(rank=rank, metrics=stage_fn(dist_env, self._stop.is_set))
        except PipelineError as error:
            return Outcome(rank=rank, error=error, traceback=traceback.format_exc())
        except Exception:
            # The driver decides whether to restart, and shows this traceback if it gives up.
            return Outcome(rank=rank, traceback=traceback.format_exc())

    def request_stop(self) -> None:
        """Set the stop flag of the stage. Ray calls this while ``run`` is executing."""
        self._stop.set()


def _exit_with_parent(parent: int) -> None:
    # A process whose raylet was killed would continue training: nobody is left to end it. Its
    # parent process is the raylet; after its death the kernel reports another one.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
