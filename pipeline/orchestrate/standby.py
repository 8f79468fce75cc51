"""Processes that stand by, to replace those of a group that fails.

Most of a restart is spent on new processes: Python, torch, DeepSpeed and the compiler have to be
imported again. A second set of processes does that while the first one trains, once: after a
failure they become the new group, and others stand by.

Only with our own Ray: on a cluster, a process without an assigned GPU sees none.
"""

from __future__ import annotations

import contextlib
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from pipeline.orchestrate.placement import Placement
from pipeline.orchestrate.ray_loss import RayLost
from pipeline.orchestrate.worker import Worker
from pipeline.runtime import environment

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from pipeline.orchestrate.worker_group import WorkerHandle

_READY_S = 0.2  # of an answer that is known to be there


class Standby:
    """The processes that stand by for one stage.

    Args:
        placement: of the stage; ``standby_after_s`` says when they are started.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._begun = time.monotonic()
        self._workers: list[WorkerHandle] = []
        self._warm: list[ObjectRef[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Of a Ray that was lost, no process is left, and a call to it would not return.
        if not isinstance(error, RayLost):
            self.close()

    def group_started(self) -> None:
        """A group has started: it has to run for some time before others stand by for it."""
        self._begun = time.monotonic()

    def poll(self) -> None:
        """Start the processes when it is time. Call it several times per second."""
        placement = self._placement
        waits = placement.standby_after_s
        if not waits or placement.candidates is not None or self._workers:
            return
        if time.monotonic() - self._begun < waits:
            return
        import ray

        # They take no CPU of Ray's account: until they are needed, they do nothing.
        actor = ray.remote(Worker).options(num_cpus=0, max_concurrency=4)
        threads = placement.threads or 1
        variables = environment.training_process(placement.device, threads)
        for _ in range(placement.processes):
            worker = cast("WorkerHandle", actor.remote())
            self._workers.append(worker)
            self._warm.append(worker.warm_up.remote(placement.device, variables))

    def take(self) -> list[WorkerHandle]:
        """The processes, to become a group; [] if they are not all ready."""
        import ray

        workers, warm = self._workers, self._warm
        if not workers:
            return []
        ready, _ = ray.wait(warm, num_returns=len(warm), timeout=_READY_S)
        try:
            ray.get(ready)
        except ray.exceptions.RayError:
            ready = []
        if len(ready) < len(workers):
            self.close()
            return []
        self._workers, self._warm = [], []
        return workers

    def close(self) -> None:
        """End the processes that stand by."""
        import ray

        for worker in self._workers:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(cast("ActorHandle[Worker]", worker), no_restart=True)
        self._workers, self._warm = [], []
