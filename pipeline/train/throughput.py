"""Where the time of this process goes, and how many images it trains on per second."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from pipeline.data.loader import TrainLoader
from pipeline.monitor import tags
from pipeline.monitor.goodput import DATA_WAIT, START, STEP


class Throughput:
    """A clock that always runs for one part of the goodput, and the rates since the last log.

    It runs for START until another part begins.

    Args:
        step: optimizer steps done so far.
    """

    def __init__(self, loader: TrainLoader, step: int) -> None:
        self._loader = loader
        self._step = step
        self._waited = loader.data_wait
        self._part = START
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def begin(self, part: str) -> None:
        """From now on, the time belongs to ``part``."""
        now = time.perf_counter()
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._since = now
        self._part = part

    @contextlib.contextmanager
    def spent_on(self, part: str) -> Iterator[None]:
        """The time inside the block belongs to ``part``, and then to the same part as before."""
        before = self._part
        self.begin(part)
        yield
        self.begin(before)

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call. Waiting for data is no part of the steps."""
        self.begin(self._part)
        # The loader measures its waits itself, inside the steps.
        waited = self._loader.data_wait - self._waited
        self._waited = self._loader.data_wait
        seconds = self._seconds
        self._seconds = {}
        if waited:
            seconds[DATA_WAIT] = waited
            seconds[STEP] = max(0.0, seconds.get(STEP, 0.0) - waited)
        return seconds

    def rewind(self, step: int) -> None:
        """Training has returned to ``step``: rates count from there."""
        self._step = step

    def rates(self, step: int, seconds: dict[str, float]) -> dict[str, float]:
        """Images per second, of all processes, and share of the time spent waiting for data.

        Args:
            step: optimizer steps done so far.
            seconds: of ``take``, since the last call of ``rates``.
        """
        waited = seconds.get(DATA_WAIT, 0.0)
        # Two logs within one tick of the clock must not divide by zero.
        trained = max(seconds.get(STEP, 0.0) + waited, 1e-9)
        images = (step - self._step) * self._loader.global_batch
        self._step = step
        return {tags.IMAGES_PER_S: images / trained, tags.DATA_WAIT_SHARE: waited / trained}
