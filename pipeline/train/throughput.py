"""How fast training goes, evaluation and checkpoints left out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from pipeline.data.loader import TrainLoader


class Throughput:
    """Images per second and data-wait share since the last reading."""

    def __init__(self, loader: TrainLoader, step: int) -> None:
        self._loader, self._step = loader, step
        self._since, self._waited = time.perf_counter(), loader.data_wait

    def rates(self, step: int) -> dict[str, float]:
        """Of the steps since the last reading, up to ``step`` (steps done); images of all processes."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        result = {
            "throughput/images_per_s": (step - self._step) * self._loader.global_batch / seconds,
            "throughput/data_wait_share": (self._loader.data_wait - self._waited) / seconds,
        }
        self._since, self._step, self._waited = now, step, self._loader.data_wait
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens meanwhile does not count."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started
