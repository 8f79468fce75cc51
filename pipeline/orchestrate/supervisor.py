"""A group of training processes: one Ray actor each, watched by one loop, ended together.

Peers of a failed rank hang in their collective, so the first error ends the whole group; a new group, with a new
generation number and a new rendezvous, goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import Interrupted, PipelineError, StageError
from pipeline.files import write_text
from pipeline.layout import RunDir
from pipeline.orchestrate.signals import interrupted
from pipeline.orchestrate.worker import Entry, Outcome, Worker

RESTARTS = 3  # of a group without progress in between
_POLL = 0.2  # seconds
_SETTLE = 1.5  # seconds in which a process's death may show up behind the errors that it causes in its peers


@dataclass(frozen=True)
class Placement:
    """What a group consists of."""

    stage: str
    processes: int
    threads: int  # compute threads of each process
    device: str  # cpu or cuda
    run_dir: RunDir
    stop_grace: float = 600.0  # seconds that a stop on request may take


class GroupDied(StageError):
    """The group broke in a way that a restart may cure: a process was lost, or an unforeseen error came up."""

    def __init__(
        self, cause: str, *, place: str = "", remedy: str = "", lost: bool = False
    ) -> None:
        super().__init__(cause, place=place, remedy=remedy)
        self.lost = lost  # a process died, rather than raised


def run_supervised(
    entry: Entry,
    placement: Placement,
    *,
    stop: Callable[[], bool],
    tick: Callable[[], int],
    log: Callable[[str, str], None],
) -> dict[str, float]:
    """Run ``entry`` on all ranks, restarting the group when it breaks; returns rank 0's metrics.

    Args:
        stop: whether the run was asked to stop; handed on to the ranks.
        tick: called several times a second; returns the highest step reached so far.
        log: tells the user a sentence, with a level.

    Raises:
        Interrupted: all ranks stopped on request.
        StageError: the group broke ``RESTARTS`` times more without getting further, or at once with an error of its own.
        PipelineError: the error of the first rank that raised one.
    """
    reached, failures = tick(), 0
    while True:
        try:
            return run_group(entry, placement, stop=stop, tick=tick)
        except GroupDied as error:
            highest = tick()
            progress, reached = highest > reached, highest
            failures = 0 if progress else failures + 1
            # An exception before any progress would come again; the loss of a process need not.
            if failures > RESTARTS or not (progress or error.lost):
                times = f" ({failures} times without getting any further)" if failures > 1 else ""
                raise StageError(
                    error.cause + times, place=error.place, remedy=error.remedy
                ) from None
            if stop():
                raise interrupted() from None
            log(error.message, "error")
            log(
                f"starting the processes again from the last checkpoint ({failures or 1} of {RESTARTS})",
                "warning",
            )


def run_group(
    entry: Entry, placement: Placement, *, stop: Callable[[], bool], tick: Callable[[], int]
) -> dict[str, float]:
    """One group, from its start to the end of its last process. Raises as ``run_supervised``, and GroupDied."""
    generation = _claim(placement.run_dir.fence(placement.stage))
    with _actors(placement) as actors:
        refs = _start(actors, entry, placement, generation)
        outcomes = _watch(actors, refs, placement, stop, tick)
    return outcomes[0].metrics


def _claim(fence: Path) -> int:
    """The number of a new group, greater than that of any group before it, of this driver or an earlier one."""
    generation = int(fence.read_text()) + 1 if fence.exists() else 0
    write_text(fence, str(generation))
    return generation


@contextlib.contextmanager
def _actors(placement: Placement) -> Iterator[list[Any]]:
    """The actors of a group, placed together; killed, whatever they do, on the way out."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    gpus = 1 if placement.device == "cuda" else 0
    group = placement_group(
        [{"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}] * placement.processes, strategy="PACK"
    )
    actors: list[Any] = []
    try:
        if not group.wait(timeout_seconds=60):
            raise StageError(
                f"{placement.processes} processes on {placement.device} find no place on this machine",
                place=placement.stage,
                remedy="lower cluster.processes",
            )
        for rank in range(placement.processes):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            make = ray.remote(Worker).options(
                num_cpus=1, num_gpus=gpus, max_concurrency=4, scheduling_strategy=strategy
            )
            actors.append(make.remote(_log(placement, rank), _environment(placement)))
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor, no_restart=True)
        remove_placement_group(group)


def _start(actors: list[Any], entry: Entry, placement: Placement, generation: int) -> list[Any]:
    import ray

    try:
        port = ray.get(actors[0].free_port.remote(), timeout=120)
    except ray.exceptions.RayError as error:
        raise _lost(placement, 0, error) from None
    common = {
        "WORLD_SIZE": str(len(actors)),
        "LOCAL_WORLD_SIZE": str(len(actors)),
        "LOCAL_SIZE": str(len(actors)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PIPELINE_GENERATION": str(generation),
    }
    return [
        actor.run.remote(entry, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, actor in enumerate(actors)
    ]


def _watch(
    actors: list[Any],
    refs: list[Any],
    placement: Placement,
    stop: Callable[[], bool],
    tick: Callable[[], int],
) -> list[Outcome]:
    """Wait for all ranks; returns their outcomes by rank."""
    import ray

    rank_of = {ref: rank for rank, ref in enumerate(refs)}
    waiting = list(refs)
    outcomes: dict[int, Outcome] = {}
    stop_by: float | None = None
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_POLL)
        tick()
        if ready:
            found = _collect(ready, rank_of, placement)
            if any(
                outcome.failed and not isinstance(outcome.error, Interrupted) for outcome in found
            ):
                late, _ = (
                    ray.wait(waiting, num_returns=len(waiting), timeout=_SETTLE)
                    if waiting
                    else ([], [])
                )
                raise _first_error(found + _collect(late, rank_of, placement), placement)
            outcomes |= {outcome.rank: outcome for outcome in found}
        if stop() and stop_by is None:
            stop_by = time.monotonic() + placement.stop_grace
            for actor in actors:
                actor.request_stop.remote()
        if stop_by is not None and time.monotonic() > stop_by:
            raise Interrupted(
                f"stopped on request, but not within {placement.stop_grace:.0f} s: ended without a new checkpoint",
                remedy="the same command goes on from the checkpoint before",
            )
    for outcome in outcomes.values():
        if outcome.error is not None:  # all that is left here are stops on request
            raise outcome.error
    return [outcomes[rank] for rank in sorted(outcomes)]


def _collect(refs: list[Any], rank_of: dict[Any, int], placement: Placement) -> list[Outcome]:
    """Outcomes of finished ranks; a process that died counts as the earliest failure, for it is the cause of the others."""
    import ray

    outcomes = []
    for ref in refs:
        try:
            outcomes.append(ray.get(ref))
        except ray.exceptions.RayError as error:
            lost = _lost(placement, rank_of[ref], error)
            outcomes.append(Outcome(rank_of[ref], error=lost, traceback=lost.message, at=0.0))
    return outcomes


def _first_error(outcomes: list[Outcome], placement: Placement) -> PipelineError:
    """The error to report: of the first rank that failed, with its traceback in full if it is not one for the user."""
    failed = [
        outcome
        for outcome in outcomes
        if outcome.failed and not isinstance(outcome.error, Interrupted)
    ]
    first = min(failed, key=lambda outcome: outcome.at)
    if first.error is not None:
        return first.error
    later = [outcome for outcome in failed if outcome is not first]
    others = "".join(
        f"also rank {outcome.rank}: {outcome.traceback.strip().splitlines()[-1]}\n"
        for outcome in later
    )
    return GroupDied(
        f"rank {first.rank} failed\n{others}{first.traceback.rstrip()}",
        place=placement.stage,
        remedy=f"all that it printed: {_log(placement, first.rank)}",
    )


def _lost(placement: Placement, rank: int, error: Exception) -> GroupDied:
    log = _log(placement, rank)
    tail = log.read_text(errors="replace").splitlines()[-15:] if log.exists() else []
    text = "".join(f"\n  | {line}" for line in tail)
    reason = str(error).strip().splitlines()
    why = next((line.strip() for line in reason if "exit" in line.lower()), type(error).__name__)
    return GroupDied(
        f"the process of rank {rank} died: {why}{text}",
        place=placement.stage,
        remedy=f"its log: {log}",
        lost=True,
    )


def _log(placement: Placement, rank: int) -> Path:
    return placement.run_dir.log(placement.stage, rank)


def _environment(placement: Placement) -> dict[str, str]:
    """What is the same for every rank and must stand before torch and DeepSpeed are imported."""
    environment = {
        "OMP_NUM_THREADS": str(placement.threads),
        "DS_BUILD_OPS": "0",
        "PYTHONUNBUFFERED": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if placement.device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    return environment
