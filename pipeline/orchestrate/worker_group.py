"""The processes of a stage as one group of Ray actors: placement, start, outcomes, errors.

Example: a stage on 4 GPUs is a placement group of 4 bundles {CPU: 1, GPU: 1} with one ``Worker``
actor each. The workers meet at a port of rank 0.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from pipeline import command
from pipeline.errors import Interrupted, PipelineError, StageError
from pipeline.layout import RunDir
from pipeline.orchestrate.worker import Outcome, StageFn, Worker
from pipeline.runtime import environment

if TYPE_CHECKING:
    from pathlib import Path

    from ray import ObjectRef
    from ray.actor import ActorHandle

Value = TypeVar("Value")

_PLACEMENT_TIMEOUT_S = 60
_START_TIMEOUT_S = 120
_POLL_S = 0.2
# After an error, wait so long for further ones: the death of a process often becomes known after
# the connection errors that it causes in its peers, and it is the death that must be reported.
SETTLE_S = 1.5
_LOG_TAIL = 15  # lines of a dead process's log in the error message


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how the processes of a stage run.

    ``stop_grace_s``: seconds that the processes get after a stop request, to finish the current
    step and write a checkpoint. 0: the stage has nothing to save, so its processes are killed at
    once.
    """

    stage: str
    processes: int
    threads: int  # compute threads of each process
    device: str  # cpu or cuda
    run_dir: RunDir
    stop_grace_s: float = 600.0

    def log(self, rank: int) -> Path:
        """Output of one process."""
        return self.run_dir.log(self.stage, rank)


class GroupDied(StageError):
    """The group failed in a way that a restart may cure."""

    def __init__(
        self, cause: str, *, place: str = "", remedy: str = "", lost: bool = False
    ) -> None:
        super().__init__(cause, place=place, remedy=remedy)
        self.lost = lost  # True: a process died. False: a process raised an exception.


class RemoteMethod(Protocol[Value]):
    """A method of an actor, as Ray offers it to the driver."""

    def remote(self, *arguments: object) -> ObjectRef[Value]: ...


class WorkerHandle(Protocol):
    """The driver's handle of a ``Worker`` actor."""

    free_port: RemoteMethod[int]
    run: RemoteMethod[Outcome]
    request_stop: RemoteMethod[None]


@contextlib.contextmanager
def worker_group(placement: Placement, check: Callable[[], None]) -> Iterator[list[WorkerHandle]]:
    """Create the workers of a group, by rank. On exit they are killed, whatever they are doing.

    Args:
        check: called several times per second, and on exit; raises RayLost if Ray is lost.

    Raises:
        StageError: the machine has too few GPUs or CPU cores.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    # One bundle per process; PACK puts as many as possible on the same node.
    gpus = 1 if placement.device == "cuda" else 0
    bundle: dict[str, float] = {"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}
    group = placement_group([bundle] * placement.processes, strategy="PACK")
    workers: list[WorkerHandle] = []
    try:
        if not _wait_for(lambda: group.wait(_POLL_S), _PLACEMENT_TIMEOUT_S, check):
            raise StageError(
                f"not enough {'GPUs' if gpus else 'CPU cores'} for {placement.processes} processes",
                place=placement.stage,
                remedy="lower cluster.processes",
            )
        for rank in range(placement.processes):
            # One thread runs the stage, another one receives the stop request meanwhile.
            actor = ray.remote(Worker).options(
                num_cpus=1,
                num_gpus=gpus,
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=rank
                ),
            )
            handle = actor.remote(placement.log(rank), _environment(placement))
            workers.append(cast(WorkerHandle, handle))
        yield workers
    finally:
        # A lost Ray raises here: no worker is left, and the calls below would never return.
        check()
        # Kill, do not ask: the peers of a failed rank hang in a collective operation.
        for worker in workers:
            ray.kill(cast("ActorHandle[Worker]", worker), no_restart=True)
        remove_placement_group(group)


def start(
    workers: Sequence[WorkerHandle],
    stage_fn: StageFn,
    placement: Placement,
    generation: int,
    check: Callable[[], None],
) -> dict[ObjectRef[Outcome], int]:
    """Start the stage on every worker; returns the rank of each future outcome.

    Args:
        check: called several times per second; may raise to cancel the start.

    Raises:
        GroupDied: the process of rank 0 died before it could name a port.
    """
    import ray

    answer = workers[0].free_port.remote()
    _wait_for(lambda: bool(ray.wait([answer], timeout=_POLL_S)[0]), _START_TIMEOUT_S, check)
    try:
        port = ray.get(answer, timeout=0)
    except ray.exceptions.RayError as error:
        time.sleep(SETTLE_S)
        raise _lost_process(placement, 0, error) from None
    rendezvous = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PIPELINE_GENERATION": str(generation),
    }
    size = len(workers)
    return {
        worker.run.remote(
            stage_fn, rendezvous | environment.rank_of_group(rank, size, rank, size)
        ): rank
        for rank, worker in enumerate(workers)
    }


def _wait_for(ready: Callable[[], bool], timeout_s: float, check: Callable[[], None]) -> bool:
    """Call ``ready``, which may block for ``_POLL_S``, until it is true or the time is over."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        check()
        if time.monotonic() > deadline:
            return False
    return True


def collect(
    refs: Sequence[ObjectRef[Outcome]], rank_of: dict[ObjectRef[Outcome], int], placement: Placement
) -> list[Outcome]:
    """Fetch the outcomes of ranks that have ended."""
    import ray

    outcomes = []
    for ref in refs:
        rank = rank_of[ref]
        try:
            outcomes.append(ray.get(ref))
        except ray.exceptions.RayError as error:
            # Peers of a dead process raise connection errors, often before Ray reports its death.
            # The time 0 makes the death the earliest failure, and so the one that is reported.
            lost = _lost_process(placement, rank, error)
            outcomes.append(Outcome(rank=rank, error=lost, traceback=lost.message, ended_at=0.0))
    return outcomes


def is_failure(outcome: Outcome) -> bool:
    """True if the rank failed, rather than finished or stopped on request."""
    return outcome.failed and not isinstance(outcome.error, Interrupted)


def first_error(outcomes: Sequence[Outcome], placement: Placement) -> PipelineError:
    """The error of the rank that failed first.

    An error that is meant for the user is returned as it is. Any other becomes a GroupDied with the
    traceback of the first rank in full and one line per other rank.
    """
    failures = sorted(filter(is_failure, outcomes), key=lambda outcome: outcome.ended_at)
    first = failures[0]
    if first.error is not None:
        return first.error
    others = "".join(
        f"also rank {outcome.rank}: {outcome.traceback.strip().splitlines()[-1]}\n"
        for outcome in failures[1:]
    )
    return GroupDied(
        f"rank {first.rank} failed\n{others}{first.traceback.rstrip()}",
        place=placement.stage,
        remedy=f"its whole output: {placement.log(first.rank)}",
    )


def _lost_process(placement: Placement, rank: int, error: Exception) -> GroupDied:
    log = placement.log(rank)
    tail = log.read_text(errors="replace").splitlines()[-_LOG_TAIL:] if log.exists() else []
    output = "".join(f"\n  | {line}" for line in tail)
    # Of Ray's long text only the line about the exit ("Worker exit type: SYSTEM_ERROR ...")
    # matters.
    lines = str(error).strip().splitlines()
    reason = next((line.strip() for line in lines if "exit" in line.lower()), type(error).__name__)
    return GroupDied(
        f"the process of rank {rank} died: {reason}{output}",
        place=placement.stage,
        remedy=f"its whole output: {log}",
        lost=True,
    )


def _environment(placement: Placement) -> dict[str, str]:
    """Variables that are the same for every rank."""
    variables = environment.training_process(placement.device, placement.threads)
    # Remedies in errors of a worker name the command that the user typed at the driver.
    return variables | {command.VARIABLE: command.program()}
