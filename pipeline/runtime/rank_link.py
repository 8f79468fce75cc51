"""The link between the code of a rank and whoever supervises it.

Stop requests come in, signs of progress go out. The stage runs in the main thread of its process;
another thread answers the supervisor meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A sign of progress.

    ``count``: of such signs so far; ``step``: optimizer steps done; ``phase``: a part of the
    goodput (``monitor.goodput``).
    """

    count: int
    step: int
    phase: str


class RankLink:
    """One per rank.

    Args:
        stop_requested: whether whoever started this process wants it to stop; by default, only
            ``request_stop`` counts.
    """

    def __init__(self, stop_requested: Callable[[], bool] = lambda: False) -> None:
        self._asked = stop_requested
        self._stop = threading.Event()
        # Replaced as a whole: another thread reads it at any time.
        self._beat = Beat(count=0, step=0, phase="start")
        self.main_thread = threading.get_ident()

    def request_stop(self) -> None:
        """Ask the stage to stop."""
        self._stop.set()

    def stop_requested(self) -> bool:
        """True after a stop request. A stage asks once per step."""
        return self._stop.is_set() or self._asked()

    def beat(self, step: int, phase: str) -> None:
        """Show progress: a step, a batch of an evaluation, the beginning of another phase."""
        self._beat = Beat(count=self._beat.count + 1, step=step, phase=phase)

    def last_beat(self) -> Beat:
        """The newest sign of progress."""
        return self._beat
