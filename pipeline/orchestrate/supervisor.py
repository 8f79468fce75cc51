"""Runs a stage in a group of processes, watches them in one loop, restarts the group when it fails.

The peers of a failed rank hang in their collective operation, so the first error ends the whole
group. A new group, with a new generation number and a new rendezvous, resumes from the last
checkpoint.

On a cluster, a machine that is about to leave ends the group too, but after a checkpoint of the
present step: nothing is lost, and it does not count as a failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import Interrupted, PipelineError, StageError
from pipeline.files import write_text
from pipeline.monitor.goodput import IDLE, RECOVERY, START
from pipeline.orchestrate.failure_class import PROGRAM
from pipeline.orchestrate.group_outcomes import collect, first_error, is_death, is_failure
from pipeline.orchestrate.hang_report import hang_error
from pipeline.orchestrate.heartbeats import Hang, Heartbeats
from pipeline.orchestrate.machine_pool import MachineChange, MachinePool
from pipeline.orchestrate.placement import GroupDied, MachinesChanged, Placement
from pipeline.orchestrate.signals import interrupted
from pipeline.orchestrate.standby import Standby
from pipeline.orchestrate.user_errors import RERUN
from pipeline.orchestrate.worker import Outcome, StageFn
from pipeline.orchestrate.worker_group import SETTLE_S, WorkerGroup, start, worker_group
from pipeline.reporting import Log

if TYPE_CHECKING:
    from ray import ObjectRef

RESTARTS = 3  # of a group without progress in between
_POLL_S = 0.2
SETTLE_ON_CLUSTER_S = 4.0


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What the supervisor asks and calls while a group runs.

    Args:
        stop: true after a stop request. The supervisor passes the request on to the ranks.
        poll: called several times per second; returns the highest step reached so far.
        check: called as often; raises if Ray is lost, which no restart of the group can mend.
        log: logs a message for the user.
        phase: records what the time from now on belongs to.
        failures: groups that have failed since the last progress, in earlier calls.
        count_failures: records that number.
        pool: the machines of a cluster; None: this machine, with our own Ray.
    """

    stop: Callable[[], bool]
    poll: Callable[[], int]
    check: Callable[[], None]
    log: Log
    phase: Callable[[str], None] = lambda part: None
    failures: int = 0
    count_failures: Callable[[int], None] = lambda failures: None
    pool: MachinePool | None = None

    def check_start(self) -> None:
        """Call it while a group starts: no step was done yet, so nothing is lost by ending."""
        self.check()
        if self.stop():
            raise interrupted()

    def change(self, group: WorkerGroup) -> MachineChange | None:
        """Why the group must be formed again, if it must."""
        return None if self.pool is None else self.pool.change(group.placement, group.machines)


def run_supervised(stage_fn: StageFn, placement: Placement, watch: Watch) -> dict[str, float]:
    """Run ``stage_fn`` on all ranks, restart the group when it fails; return rank 0's metrics.

    Raises:
        Interrupted: the stage stopped on request, or too few machines are left.
        StageError: the group failed ``RESTARTS`` times more without progress, or raised an
            exception before any progress.
        RayLost: raised by ``watch.check``.
        PipelineError: the error of the first rank that raised one.
    """
    with Standby(placement) as standby:
        return _run_groups(stage_fn, placement, watch, standby)


def _run_groups(
    stage_fn: StageFn, placement: Placement, watch: Watch, standby: Standby
) -> dict[str, float]:
    reached = watch.poll()
    # A call may always try once. What failed in earlier calls leaves no restarts.
    failures = min(watch.failures, RESTARTS)
    begun = START
    while True:
        if watch.stop():
            raise interrupted()
        placed = placement
        if watch.pool is not None:
            # Waiting for machines is nobody's work.
            watch.phase(IDLE)
            placed = watch.pool.place(placement)
            watch.phase(begun)
        try:
            return run_group(stage_fn, placed, watch, standby)
        except Interrupted:
            if watch.poll() > reached:
                watch.count_failures(0)
            raise
        except MachinesChanged as change:
            begun = _begin_recovery(watch)
            watch.log(f"{change}; forming the group of processes again", "warning")
        except GroupDied as error:
            if watch.pool is not None and error.machine is not None:
                if error.kind.leaves_out:
                    watch.pool.leave_out(error.machine)
                elif error.lost:
                    watch.pool.avoid(error.machine)
            begun = _begin_recovery(watch)
            highest = watch.poll()
            progress = highest > reached
            reached = highest
            failures = 0 if progress else failures + 1
            watch.count_failures(failures)
            # Restart or give up?
            #  - A process was lost, or device, memory or storage failed: up to RESTARTS times,
            #    counted from the last progress. A crash loop thus ends, a long run survives many
            #    faults.
            #  - Any other exception after progress: likewise; it may come from a hardware fault.
            #  - Any other exception before progress: it would come again, so give up at once.
            may_pass = progress or error.lost or error.kind is not PROGRAM
            if failures > RESTARTS or not may_pass:
                count = f" (failed {failures} times without progress)" if failures > 1 else ""
                raise StageError(
                    error.cause + count, place=error.place, remedy=error.remedy
                ) from None
            if watch.stop():
                raise interrupted() from None
            watch.log(error.message, "error")
            watch.log(
                "restarting the processes from the last checkpoint "
                f"(restart {failures or 1} of {RESTARTS})",
                "warning",
            )


def _begin_recovery(watch: Watch) -> str:
    """Record that the processes have ended too early."""
    watch.poll()  # what they have written belongs to the time before
    watch.phase(RECOVERY)
    return RECOVERY


def run_group(
    stage_fn: StageFn, placement: Placement, watch: Watch, standby: Standby
) -> dict[str, float]:
    """Run one group until its last process ends, on the processes that stand by if there are any.

    Raises as ``run_supervised``, and GroupDied and MachinesChanged.
    """
    # Claim the generation before any process of the group exists. A process of an earlier group may
    # still be alive, on a host that lost its connection; from now on it must not commit results.
    generation = claim_generation(placement.fence)
    outcomes: dict[int, Outcome] = {}

    def check_room() -> None:
        watch.check_start()
        if watch.pool is not None:
            watch.pool.require_same()

    with worker_group(placement, watch.check, check_room, standby.take()) as group:
        standby.group_started()
        rank_of = start(group, stage_fn, generation, watch.check_start)
        _log_group(group, watch)
        waiting = list(rank_of)
        stopping = _Stopping(group)
        heartbeats = Heartbeats(group)
        while waiting:
            ended, waiting = _wait(waiting, _POLL_S)
            watch.check()
            watch.poll()
            new = collect(ended, rank_of, group)
            if any(map(is_failure, new)):
                new += _late_outcomes(waiting, rank_of, group)
                stopping.fail(first_error(new, group))
            outcomes |= {outcome.rank: outcome for outcome in new}
            standby.poll()
            hang = heartbeats.poll([rank_of[ref] for ref in waiting])
            if waiting and watch.stop():
                stopping.check(None)
            elif waiting and (change := stopping.change or watch.change(group)):
                if stopping.change is None:
                    watch.log(f"{change.text}: asking all ranks to stop", "warning")
                stopping.check(change)
            elif hang is not None:  # after a stop request, the grace decides
                raise _end_hang(group, hang)
    for outcome in outcomes.values():
        if outcome.error is not None:  # failures were raised above: this one is a stop on request
            raise outcome.error if stopping.change is None else ended_by(stopping.change)
    return outcomes[0].metrics


def _end_hang(group: WorkerGroup, hang: Hang) -> GroupDied:
    """End the processes of a group that hangs; why it hangs."""
    error = hang_error(group, hang)
    group.kill()
    return error


def _late_outcomes(
    waiting: Sequence[ObjectRef[Outcome]],
    rank_of: dict[ObjectRef[Outcome], int],
    group: WorkerGroup,
) -> list[Outcome]:
    """After the first failure, wait for the outcomes that may tell its cause.

    The death of a process often becomes known after the connection errors that it causes in its
    peers, and it is the death that must be reported: at once on this machine, later for a machine.
    """
    late: list[Outcome] = []
    deadline = time.monotonic() + (SETTLE_ON_CLUSTER_S if group.machines else SETTLE_S)
    while waiting and not any(map(is_death, late)) and time.monotonic() < deadline:
        ended, waiting = _wait(waiting, _POLL_S)
        late += collect(ended, rank_of, group)
    return late


def _log_group(group: WorkerGroup, watch: Watch) -> None:
    """On a cluster, log where the ranks are, and which machines are idle."""
    if watch.pool is not None:
        idle = watch.pool.idle(group.machines)
        watch.log(group.describe() + (f"; idle: {idle}" if idle else ""))


def ended_by(change: MachineChange) -> Exception:
    """The exception that ends a group whose ranks have saved because of a change."""
    if change.ends_run:
        return Interrupted(change.text, remedy=f"when it is back, {RERUN}")
    return MachinesChanged(change.text)


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
    """Asks the ranks to stop and limits the time that they take to end.

    ``change``: why, if it is because of the machines; None after a stop request of the user.
    """

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group
        self._grace_s = group.placement.stop_grace_s
        self._deadline: float | None = None  # None: the workers do not know of the request yet
        self.change: MachineChange | None = None

    def check(self, change: MachineChange | None) -> None:
        """Call repeatedly after a stop request.

        Raises:
            Interrupted, MachinesChanged: the workers have nothing to save, or their time is over.
                Leaving the worker group kills them.
        """
        self.change = change
        if self._grace_s == 0:
            raise interrupted() if change is None else ended_by(change)
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_s
            for member in self._group.members:
                member.worker.request_stop.remote()
        elif time.monotonic() > self._deadline:
            cause = f"no checkpoint was written within {self._grace_s:.0f} s"
            if change is not None and not change.ends_run:
                raise MachinesChanged(f"{change.text}; {cause}")
            raise Interrupted(
                f"{'stop requested' if change is None else change.text}, but {cause}",
                remedy="rerun the same command to resume from the previous checkpoint",
            )

    def fail(self, error: PipelineError) -> None:
        """Raise the error of the group. It is no failure if a machine left before all had saved."""
        change = self.change
        if change is not None and change.leaving and isinstance(error, GroupDied):
            text = f"{error.cause}\n{change.text}, and was gone before all ranks had saved"
            raise ended_by(replace(change, text=text))
        raise error


def _wait(
    refs: Sequence[ObjectRef[Outcome]], timeout_s: float
) -> tuple[list[ObjectRef[Outcome]], list[ObjectRef[Outcome]]]:
    """Wait until all ranks have ended, or for the timeout; returns (ended, still running)."""
    import ray

    if not refs:  # ray.wait refuses an empty list
        return [], []
    return ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)
