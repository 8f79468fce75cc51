"""Finds out that a process hangs: it shows no progress any more, though it exists.

A stopped process, a deadlock and a stuck file system look alike from here: the counter of the
process does not move, or it does not answer at all. Time is measured by the clock of the driver.
Nothing is written to files, which may be what hangs.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.monitor.goodput import STEP
from pipeline.orchestrate.worker_group import WorkerGroup
from pipeline.runtime.rank_link import Beat

if TYPE_CHECKING:
    from ray import ObjectRef

_PERIOD_S = 1.0  # between two questions to a process
_STEPS = 20  # so many usual steps may pass, once enough are known
_KNOWN = 5  # steps
# A loader that waits for a busy file system, or a step that compiles, is no hang.
_LEAST_S = 60.0


@dataclass(kw_only=True)
class _Pulse:
    """What is known of a rank. ``changed``: when its counter was last seen to move."""

    beat: Beat = field(default_factory=lambda: Beat(count=-1, step=0, phase=""))
    changed: float = field(default_factory=time.monotonic)
    asked: float = 0.0
    answer: ObjectRef[Beat] | None = None


@dataclass(frozen=True, kw_only=True)
class Hang:
    """A group of which at least one process shows no progress.

    ``silent_s``: since the last sign of the rank that has been silent longest; ``limit_s``: what it
    may take; ``beats``: the last sign of every rank that has not ended.
    """

    silent_s: float
    limit_s: float
    beats: dict[int, Beat]


class Heartbeats:
    """Asks the ranks of a group for signs of progress, without waiting for their answers."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group
        self._timeout = group.placement.hang_timeout_s
        self._pulses = {rank: _Pulse() for rank in range(len(group.members))}
        self._step_times: deque[float] = deque(maxlen=_STEPS)  # of rank 0

    def poll(self, running: Collection[int]) -> Hang | None:
        """Ask again and look at the answers; call it several times per second.

        Args:
            running: the ranks that have not ended.

        Returns:
            The state of the group if one of them hangs.
        """
        if not self._timeout:
            return None
        now = time.monotonic()
        for rank in running:
            self._ask(rank, now)
        silent = {rank: now - self._pulses[rank].changed for rank in running}
        late = [rank for rank in running if silent[rank] > self._limit(rank)]
        if not late:
            return None
        worst = max(late, key=lambda rank: silent[rank])
        return Hang(
            silent_s=silent[worst],
            limit_s=self._limit(worst),
            beats={rank: self._pulses[rank].beat for rank in running},
        )

    def _ask(self, rank: int, now: float) -> None:
        """Take in the answer to the question before, and ask again."""
        import ray

        pulse = self._pulses[rank]
        if pulse.answer is not None:
            if not ray.wait([pulse.answer], timeout=0)[0]:
                return
            try:
                self._take(rank, ray.get(pulse.answer), now)
            except ray.exceptions.RayError:
                # The process has died: its outcome tells so.
                pulse.changed = now
            pulse.answer = None
        if now - pulse.asked >= _PERIOD_S:
            pulse.asked = now
            pulse.answer = self._group.members[rank].worker.last_beat.remote()

    def _take(self, rank: int, beat: Beat, now: float) -> None:
        pulse = self._pulses[rank]
        if beat.count == pulse.beat.count:
            return
        steps = beat.step - pulse.beat.step
        if rank == 0 and steps > 0 and beat.phase == pulse.beat.phase == STEP:
            self._step_times.append((now - pulse.changed) / steps)
        pulse.beat = beat
        pulse.changed = now

    def _limit(self, rank: int) -> float:
        """How long a rank may be silent in its present phase."""
        if self._pulses[rank].beat.phase != STEP or len(self._step_times) < _KNOWN:
            return self._timeout
        usual = statistics.median(self._step_times)
        return min(self._timeout, max(_LEAST_S, _STEPS * usual))
