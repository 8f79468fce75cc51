"""The Ray actor that runs one rank of a stage, and the outcome that it reports.

``worker_group`` turns the class into an actor. The function of a stage sees a plain process with
the environment that torchrun would give it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from pipeline.config import machine
from pipeline.errors import PipelineError
from pipeline.orchestrate.failure_class import kills_for_memory
from pipeline.orchestrate.ports import free_port
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.environment import forget_other_launchers
from pipeline.runtime.rank_link import Beat, RankLink

# Runs one rank. Arguments: its coordinates, and its link to the supervisor. Returns the metrics of
# the stage.
StageFn = Callable[[DistEnv, RankLink], dict[str, float]]

_PARENT_POLL_S = 0.5
_FENCE_POLL_S = 5.0  # a read of a shared file system


@dataclass(frozen=True, kw_only=True)
class WorkerPlace:
    """Where Ray has put a worker.

    ``pid`` is its process ID there. ``machine`` is the ID of Ray's node. ``device`` is the index of
    the GPU among those that the process sees, None on a CPU. ``cores`` are those of the machine;
    ``memory_kills``: see ``failure_class.kills_for_memory``.
    """

    pid: int
    machine: str
    device: int | None
    cores: int
    memory_kills: int = 0


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
    """Runs one rank of a stage in this process. Its rank follows from its place, so it comes last:

    1. ``place``: where is this process?
    2. ``free_port``: asked of rank 0.
    3. ``run``
    """

    def __init__(self) -> None:
        self._link = RankLink()
        parent = os.getppid()
        threading.Thread(target=_exit_with, args=(parent,), name="watchdog", daemon=True).start()

    def warm_up(self, device: str, variables: dict[str, str]) -> None:
        """Import what a training needs, before this process belongs to one."""
        os.environ.update(variables)
        from pipeline.train.warm_up import warm_up

        warm_up(device)

    def place(self) -> WorkerPlace:
        """Return where this process is."""
        import ray

        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return WorkerPlace(
            pid=os.getpid(),
            machine=context.get_node_id(),
            device=_device_index(gpus[0]) if gpus else None,
            cores=machine.cores(),
            memory_kills=kills_for_memory(),
        )

    def free_port(self, address: str) -> int:
        """Return a port for the rendezvous that is free on this address of the machine now."""
        return free_port(address)

    def run(
        self, stage_fn: StageFn, log: Path, fence: Path, environment: dict[str, str]
    ) -> Outcome:
        """Run the stage to its end.

        An exception is returned as a value: Ray would wrap it, and the text of its own would be
        cut.

        Args:
            log: file that receives standard output and standard error of this process from now on.
            fence: file of the newest generation. This process ends when it has been replaced.
            environment: variables to set before torch and DeepSpeed are imported.
        """
        self._link.main_thread = threading.get_ident()
        forget_other_launchers()
        os.environ.update(environment)
        dist_env = DistEnv.from_environment()
        rank = dist_env.rank
        try:
            _redirect_output(log)
            arguments = (fence, dist_env.generation)
            threading.Thread(target=_exit_if_replaced, args=arguments, daemon=True).start()
            return Outcome(rank=rank, metrics=stage_fn(dist_env, self._link))
        except PipelineError as error:
            return Outcome(rank=rank, error=error, traceback=traceback.format_exc())
        except Exception:
            # The driver decides whether to restart, and shows this traceback if it gives up.
            return Outcome(rank=rank, traceback=traceback.format_exc())

    def request_stop(self) -> None:
        """Set the stop flag of the stage. Ray calls this while ``run`` is executing."""
        self._link.request_stop()

    def last_beat(self) -> Beat:
        """The newest sign of progress of the stage. Answered while ``run`` is executing."""
        return self._link.last_beat()

    def stack(self) -> list[str]:
        """What the stage is doing: the calls of its thread, the innermost one first."""
        frame = sys._current_frames().get(self._link.main_thread)
        calls = traceback.extract_stack(frame) if frame is not None else []
        return [f"{call.name} ({call.filename}:{call.lineno})" for call in reversed(calls)]


def _device_index(gpu: str) -> int:
    """The index of a GPU among those that this process sees.

    Ray names a GPU as CUDA_VISIBLE_DEVICES of its node does, and usually hides all others: "3" is
    then index 0.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return int(gpu) if visible is None else visible.split(",").index(gpu)


def _redirect_output(log: Path) -> None:
    # Not with its parents: on a machine that does not see the run directory, a second one would
    # come into being.
    log.parent.mkdir(exist_ok=True)
    # Replace the file descriptors, not sys.stdout: C++ code (NCCL, gloo) writes to them directly.
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # A disk that fails must not end the training at the next line of output.
    sys.stdout = _stream(1)
    sys.stderr = _stream(2)
    # A crash in C++ code leaves a stack trace in the log.
    faulthandler.enable()


class _Lossy(io.FileIO):
    """A file that drops what it cannot write."""

    def write(self, data: Any) -> int:  # a buffer
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def _stream(descriptor: int) -> TextIO:
    file = io.BufferedWriter(_Lossy(descriptor, "wb", closefd=False))
    return io.TextIOWrapper(file, errors="backslashreplace", line_buffering=True)


def _exit_with(parent: int) -> None:
    # A process whose raylet was killed would continue training: nobody is left to end it. Its
    # parent process is the raylet; after its death the kernel reports another one.
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os._exit(1)


def _exit_if_replaced(fence: Path, generation: int | None) -> None:
    # A process on a machine that is cut off from the others keeps its raylet. It learns from the
    # file that the others continue without it. NFS may answer from a cache, except to open.
    while True:
        time.sleep(_FENCE_POLL_S)
        with contextlib.suppress(OSError, ValueError), open(fence) as file:
            newest = int(file.read())
            if generation is not None and newest > generation:
                text = f"process group {generation} was replaced by {newest}: this process ends"
                print(text, file=sys.stderr, flush=True)
                os._exit(1)
