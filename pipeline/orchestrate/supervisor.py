"""Runs a stage in a group of processes, watches them in one loop, restarts the group when it fails.

The peers of a failed rank hang in their collective operation, so the first error ends the whole
group. A new group, with a new generation number and a new rendezvous, resumes from the last
checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import Interrupted, StageError
from pipeline.files import write_text
from pipeline.orchestrate.signals import interrupted
from pipeline.orchestrate.worker import Outcome, StageFn
from pipeline.orchestrate.worker_group import (
    SETTLE_S,
    GroupDied,
    Placement,
    WorkerHandle,
    collect,
    first_error,
    is_failure,
    start,
    worker_group,
)
from pipeline.reporting import Log

if TYPE_CHECKING:
    from ray import ObjectRef

RESTARTS = 3  # of a group without progress in between
_POLL_S = 0.2


def run_supervised(
    stage_fn: StageFn,
    placement: Placement,
    *,
    stop: Callable[[], bool],
    poll: Callable[[], int],
    check: Callable[[], None],
    log: Log,
) -> dict[str, float]:
    """Run ``stage_fn`` on all ranks, restart the group when it fails; return rank 0's metrics.

    Args:
        stop: true after a stop request. The supervisor passes the request on to the ranks.
        poll: called several times per second; returns the highest step reached so far.
        check: called as often; raises if Ray is lost, which no restart of the group can mend.
        log: logs a message for the user.

    Raises:
        Interrupted: the stage stopped on request.
        StageError: the group failed ``RESTARTS`` times more without progress, or raised an
            exception before any progress.
        RayLost: raised by ``check``.
        PipelineError: the error of the first rank that raised one.
    """
    reached = poll()
    failures = 0
    while True:
        if stop():
            raise interrupted()
        try:
            return run_group(stage_fn, placement, stop=stop, poll=poll, check=check)
        except GroupDied as error:
            highest = poll()
            progress = highest > reached
            reached = highest
            failures = 0 if progress else failures + 1
            # Restart or give up?
            #  - A process was lost (out of memory, killed, hardware): up to RESTARTS times, counted
            #    from the last progress. A crash loop thus ends, a long run survives many faults.
            #  - An exception after progress: likewise; it may come from a hardware fault.
            #  - An exception before any progress: it would come again, so give up at once.
            if failures > RESTARTS or not (progress or error.lost):
                count = f" (failed {failures} times without progress)" if failures > 1 else ""
                raise StageError(
                    error.cause + count, place=error.place, remedy=error.remedy
                ) from None
            if stop():
                raise interrupted() from None
            log(error.message, "error")
            log(
                "restarting the processes from the last checkpoint "
                f"(restart {failures or 1} of {RESTARTS})",
                "warning",
            )


def run_group(
    stage_fn: StageFn,
    placement: Placement,
    *,
    stop: Callable[[], bool],
    poll: Callable[[], int],
    check: Callable[[], None],
) -> dict[str, float]:
    """Run one group until its last process ends. Raises as ``run_supervised``, and GroupDied."""
    # Claim the generation before any process of the group exists. A process of an earlier group may
    # still be alive, on a host that lost its connection; from now on it must not commit results.
    generation = claim_generation(placement.run_dir.fence(placement.stage))
    outcomes: dict[int, Outcome] = {}

    def check_start() -> None:
        check()
        if stop():  # no step was done yet: nothing is lost by ending at once
            raise interrupted()

    with worker_group(placement, check) as workers:
        rank_of = start(workers, stage_fn, placement, generation, check_start)
        waiting = list(rank_of)
        stopping = _Stopping(workers, placement)
        while waiting:
            ended, waiting = _wait(waiting, _POLL_S)
            check()
            poll()
            new = collect(ended, rank_of, placement)
            if any(map(is_failure, new)):
                late, _ = _wait(waiting, SETTLE_S)
                raise first_error(new + collect(late, rank_of, placement), placement)
            outcomes |= {outcome.rank: outcome for outcome in new}
            if waiting and stop():
                stopping.check()
    for outcome in outcomes.values():
        if outcome.error is not None:  # failures were raised above: this one is a stop on request
            raise outcome.error
    return outcomes[0].metrics


def claim_generation(fence: Path) -> int:
    """Write and return the number of a new group.

    It is greater than that of any earlier group, of this driver or a previous one. Workers treat a
    missing fence as an error, so the file is replaced atomically and never removed.
    """
    try:  # read, never looked up: see train/fence.py
        generation = int(fence.read_text()) + 1
    except FileNotFoundError:
        generation = 0
    write_text(fence, str(generation))
    return generation


class _Stopping:
    """Passes a stop request on to the workers and limits the time that they take to end."""

    def __init__(self, workers: Sequence[WorkerHandle], placement: Placement) -> None:
        self._workers = workers
        self._grace_s = placement.stop_grace_s
        self._deadline: float | None = None  # None: the workers do not know of the request yet

    def check(self) -> None:
        """Call repeatedly after a stop request.

        Raises:
            Interrupted: the workers have nothing to save, or their time is over. Leaving the worker
                group kills them.
        """
        if self._grace_s == 0:
            raise interrupted()
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_s
            for worker in self._workers:
                worker.request_stop.remote()
        elif time.monotonic() > self._deadline:
            raise Interrupted(
                f"stop requested, but no checkpoint was written within {self._grace_s:.0f} s",
                remedy="rerun the same command to resume from the previous checkpoint",
            )


def _wait(
    refs: Sequence[ObjectRef[Outcome]], timeout_s: float
) -> tuple[list[ObjectRef[Outcome]], list[ObjectRef[Outcome]]]:
    """Wait until all ranks have ended, or for the timeout; returns (ended, still running)."""
    import ray

    if not refs:  # ray.wait refuses an empty list
        return [], []
    return ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)
