"""Training throughput, without the time for evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from pipeline.data.loader import TrainLoader
from pipeline.monitor import tags


class Throughput:
    """Images per second and share of time spent waiting for data, since the last log.

    Args:
        step: optimizer steps done so far.
    """

    def __init__(self, loader: TrainLoader, step: int) -> None:
        self._loader = loader
        self._step = step
        self._since = time.perf_counter()
        self._waited = loader.data_wait

    def rates(self, step: int) -> dict[str, float]:
        """Rates since the last call, now that ``step`` steps are done; images of all processes."""
        now = time.perf_counter()
        # Two logs within one tick of the clock must not divide by zero.
        seconds = max(now - self._since, 1e-9)
        images = (step - self._step) * self._loader.global_batch
        rates = {
            tags.IMAGES_PER_S: images / seconds,
            tags.DATA_WAIT_SHARE: (self._loader.data_wait - self._waited) / seconds,
        }
        self._since = now
        self._step = step
        self._waited = self._loader.data_wait
        return rates

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the block."""
        started = time.perf_counter()
        yield
        # Moving the start of the interval forward is the same as subtracting the time.
        self._since += time.perf_counter() - started
