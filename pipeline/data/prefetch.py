"""Worker threads that fill a ring of preallocated batches, in the order in which the batches are planned."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.bad_samples import BAD_SAMPLE, explain
from pipeline.data.dataset import Split
from pipeline.data.decode import Image

PREFETCH_BYTES = 512 << 20
AHEAD = (2, 8)  # batches, at least and at most
LENT = 2  # batches that are the consumer's
REASONS = 5  # that are kept
Write = Callable[
    [int, Image], None
]  # decodes and augments the i-th image of a batch into its place


@dataclass(frozen=True)
class Batch:
    """One micro batch.

    images: uint8 (n, H, W, 3), RGB; its memory is used again for the batch after the next one, so copy what is kept longer.
    labels, samples (dataset indices), views (what augmentation is keyed by), positions (places in the epoch): int64 (n,).
    epoch, step: numbers of the epoch and of the global optimizer step, from 0.
    """

    images: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor
    views: torch.Tensor
    positions: torch.Tensor
    epoch: int
    step: int


@dataclass(frozen=True)
class BatchPlan:
    """A batch before its pixels: where it is in the epoch, and how to write its images.

    ``write`` may put another sample into ``samples``, and then says in ``replaced`` why.
    """

    samples: NDArray[np.int64]
    views: NDArray[np.int64]
    positions: NDArray[np.int64]
    epoch: int
    step: int
    write: Write
    replaced: list[str] = field(default_factory=list)


class _Slot:
    """A place in the ring: the pixels of one batch on their way."""

    def __init__(self, batch: int, image_size: int, pin: bool) -> None:
        self.images = torch.empty(
            (batch, image_size, image_size, 3), dtype=torch.uint8, pin_memory=pin
        )
        self.pixels: Image = self.images.numpy()
        self.done = threading.Event()
        self.lock = threading.Lock()
        self.missing = 0
        self.error: BaseException | None = None
        self.free_after: torch.cuda.Event | None = None  # the device may still be copying from it

    def finish(self, images: int, error: BaseException | None) -> None:
        with self.lock:
            self.missing -= images
            self.error = self.error or error
            if self.missing == 0:
                self.done.set()


class PrefetchQueue:
    """Worker threads and the slots that they fill, in the order of the plans.

    Its batches, those that are the consumer's included, take at most ``prefetch_bytes`` of memory, or what `AHEAD` asks for
    at least. ``data_wait``: seconds that the consumer waited. ``replaced``: the samples replaced in the batches that it has
    had; ``reasons``: which and why, of the newest of them.
    """

    def __init__(
        self, split: Split, batch: int, image_size: int, threads: int, prefetch_bytes: int
    ) -> None:
        cv2.setNumThreads(1)  # our threads are the parallelism
        pin = torch.cuda.is_available()
        self.split, self.data_wait, self.replaced = split, 0.0, 0
        self.reasons: deque[str] = deque(maxlen=REASONS)
        self._chunk = max(1, min(16, batch // (2 * threads)))
        slots = LENT + batches_ahead(3 * batch * image_size**2, prefetch_bytes)
        self._free = [_Slot(batch, image_size, pin) for _ in range(slots)]
        self._filling: deque[tuple[BatchPlan, _Slot]] = deque()
        self._lent: deque[_Slot] = deque()
        self._tasks: queue.SimpleQueue[tuple[BatchPlan, _Slot, int, int] | None] = (
            queue.SimpleQueue()
        )
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"loader-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, plans: Iterator[BatchPlan]) -> Iterator[Batch]:
        """The batches of ``plans``, prefetched; `LENT` of them are the consumer's at any time.

        Raises:
            DataError: an image cannot be read.
        """
        self._forget_unread()
        while not self._closed:
            while len(self._lent) >= LENT:
                self._release(self._lent.popleft())
            while self._free and (plan := next(plans, None)) is not None:
                self._submit(plan, self._free.pop())
            if not self._filling:
                return
            plan, slot = self._filling.popleft()
            began = time.perf_counter()
            slot.done.wait()
            self.data_wait += time.perf_counter() - began
            if slot.error is not None:
                self._free.append(slot)
                raise slot.error
            self._lent.append(slot)
            self.replaced += len(plan.replaced)
            self.reasons.extend(plan.replaced)
            samples, views, positions = map(
                torch.from_numpy, (plan.samples, plan.views, plan.positions)
            )
            labels = torch.from_numpy(self.split.labels[plan.samples])
            yield Batch(
                slot.images[: len(samples)],
                labels,
                samples,
                views,
                positions,
                plan.epoch,
                plan.step,
            )

    def close(self) -> None:
        """End the threads; images that are being decoded are finished first."""
        self._closed = True
        while True:
            try:
                self._tasks.get_nowait()
            except queue.Empty:
                break
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _forget_unread(self) -> None:
        while self._filling:  # of an iteration that was broken off
            _, slot = self._filling.popleft()
            slot.done.wait()
            self._free.append(slot)

    def _submit(self, plan: BatchPlan, slot: _Slot) -> None:
        if slot.free_after is not None:
            slot.free_after.synchronize()
        slot.done.clear()
        slot.missing, slot.error = len(plan.samples), None
        self._filling.append((plan, slot))
        for start in range(0, len(plan.samples), self._chunk):
            self._tasks.put((plan, slot, start, min(start + self._chunk, len(plan.samples))))

    def _release(self, slot: _Slot) -> None:
        if slot.images.is_pinned():
            slot.free_after = torch.cuda.Event()
            slot.free_after.record()
        self._free.append(slot)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            plan, slot, start, stop = task
            error: BaseException | None = None
            for i in range(start, stop):
                try:
                    plan.write(i, slot.pixels[i])
                except Exception as cause:
                    error = (
                        explain(cause, self.split, int(plan.samples[i]))
                        if isinstance(cause, BAD_SAMPLE)
                        else cause
                    )
                    break
            slot.finish(stop - start, error)


def batches_ahead(batch_bytes: int, prefetch_bytes: int) -> int:
    """How many batches of ``batch_bytes`` are prepared while the consumer has its own."""
    least, most = AHEAD
    return max(least, min(most, prefetch_bytes // batch_bytes - LENT))
