"""The outcomes of the ranks of a group, and the error that a failed group reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import Interrupted, PipelineError
from pipeline.orchestrate.failure_class import (
    class_of_death,
    class_of_exception,
    exit_line,
    kills_for_memory,
)
from pipeline.orchestrate.on_machine import call_on_machine
from pipeline.orchestrate.placement import GroupDied
from pipeline.orchestrate.worker import Outcome
from pipeline.orchestrate.worker_group import WorkerGroup

if TYPE_CHECKING:
    from ray import ObjectRef

_ANSWER_S = 3.0  # of the machine of a process that died
_LOG_TAIL = 15  # lines of a dead process's log in the error message


def collect(
    refs: Sequence[ObjectRef[Outcome]], rank_of: dict[ObjectRef[Outcome], int], group: WorkerGroup
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
            lost = _lost_process(group, rank, error)
            outcomes.append(Outcome(rank=rank, error=lost, traceback=lost.message, ended_at=0.0))
    return outcomes


def is_failure(outcome: Outcome) -> bool:
    """True if the rank failed, rather than finished or stopped on request."""
    return outcome.failed and not isinstance(outcome.error, Interrupted)


def is_death(outcome: Outcome) -> bool:
    """True if the process of the rank was lost."""
    return isinstance(outcome.error, GroupDied) and outcome.error.lost


def first_error(outcomes: Sequence[Outcome], group: WorkerGroup) -> PipelineError:
    """The error of the rank that failed first.

    An error that is meant for the user is returned as it is; on a cluster it also names the machine
    and the rank. Any other becomes a GroupDied with the traceback of the first rank in full and one
    line per other rank.
    """
    failures = sorted(filter(is_failure, outcomes), key=lambda outcome: outcome.ended_at)
    first = failures[0]
    if isinstance(first.error, GroupDied) or (first.error is not None and not group.machines):
        return first.error
    if first.error is not None:
        cause = f"{first.error.cause} ({group.name(first.rank)})"
        return type(first.error)(cause, place=first.error.place, remedy=first.error.remedy)
    kind = class_of_exception(first.traceback)
    others = "".join(
        f"also {group.name(outcome.rank)}: {outcome.traceback.strip().splitlines()[-1]}\n"
        for outcome in failures[1:]
    )
    return GroupDied(
        f"{group.name(first.rank)} failed ({kind.name})\n{others}{first.traceback.rstrip()}",
        place=group.placement.stage,
        remedy="; ".join(filter(None, [kind.remedy, _output(group, first.rank)])),
        kind=kind,
        machine=group.members[first.rank].machine,
    )


def _lost_process(group: WorkerGroup, rank: int, error: Exception) -> GroupDied:
    log = group.placement.log(rank)
    tail = log.read_text(errors="replace").splitlines()[-_LOG_TAIL:] if log.exists() else []
    output = "".join(f"\n  | {line}" for line in tail)
    ending = exit_line(error)
    member = group.members[rank]
    kills = call_on_machine(member.node, kills_for_memory, timeout_s=_ANSWER_S)
    kind = class_of_death(
        f"{ending}{output}", out_of_memory=kills is not None and kills > member.place.memory_kills
    )
    return GroupDied(
        f"the process of {group.name(rank)} died ({kind.name}): {ending}{output}",
        place=group.placement.stage,
        remedy=f"{kind.remedy}; {_output(group, rank)}",
        kind=kind,
        lost=True,
        machine=member.machine,
    )


def _output(group: WorkerGroup, rank: int) -> str:
    return f"its whole output: {group.placement.log(rank)}"
