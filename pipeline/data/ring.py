"""Worker threads that fill a ring of preallocated batches, in the order in which the batches are planned."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.decode import Image
from pipeline.data.format import Split
from pipeline.errors import DataError

PREFETCH = 3
Write = Callable[[int, Image], None]  # decodes and augments the i-th image of a batch into its place


@dataclass(frozen=True)
class Batch:
    """One micro batch.

    images: uint8 (n, H, W, 3), RGB; its memory is used again for the batch after the next one, so copy what is kept longer.
    labels, samples (dataset indices), positions (places in the epoch): int64 (n,).
    epoch, step: numbers of the epoch and of the global optimizer step, from 0.
    """

    images: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor
    positions: torch.Tensor
    epoch: int
    step: int


@dataclass(frozen=True)
class Plan:
    """A batch before its pixels: where it is in the epoch, and how to write its images."""

    samples: NDArray[np.int64]
    positions: NDArray[np.int64]
    epoch: int
    step: int
    write: Write


class _Slot:
    """A place in the ring: the pixels of one batch on their way."""

    def __init__(self, batch: int, image_size: int, pin: bool) -> None:
        self.images = torch.empty((batch, image_size, image_size, 3), dtype=torch.uint8, pin_memory=pin)
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


class Ring:
    """Worker threads and the slots that they fill, in the order of the plans."""

    def __init__(self, split: Split, batch: int, image_size: int, threads: int, prefetch: int) -> None:
        cv2.setNumThreads(1)  # our threads are the parallelism
        pin = torch.cuda.is_available()
        self.split, self.data_wait = split, 0.0
        self._chunk = max(1, min(16, batch // (2 * threads)))
        self._free = [_Slot(batch, image_size, pin) for _ in range(prefetch + 2)]
        self._filling: deque[tuple[Plan, _Slot]] = deque()
        self._lent: deque[_Slot] = deque()
        self._tasks: queue.SimpleQueue[tuple[Plan, _Slot, int, int] | None] = queue.SimpleQueue()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"loader-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def run(self, plans: Iterator[Plan]) -> Iterator[Batch]:
        """The batches of ``plans``, prefetched; two of them are the consumer's at any time.

        Raises:
            DataError: an image cannot be decoded.
        """
        self._forget_unread()
        while not self._closed:
            while len(self._lent) > 1:
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
            number = len(plan.samples)
            labels = torch.from_numpy(self.split.labels[plan.samples])
            places = torch.from_numpy(plan.samples), torch.from_numpy(plan.positions)
            yield Batch(slot.images[:number], labels, *places, plan.epoch, plan.step)

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

    def _submit(self, plan: Plan, slot: _Slot) -> None:
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
                    error = _explain(cause, self.split, int(plan.samples[i]))
                    break
            slot.finish(stop - start, error)


def _explain(cause: Exception, split: Split, sample: int) -> BaseException:
    if not isinstance(cause, ValueError | OSError | cv2.error):
        return cause
    error = DataError(
        f"the image cannot be decoded: {str(cause).strip()}",
        place=split.place(sample),
        remedy="the shard has changed since it was made: delete it and run the prepare stage again",
    )
    error.__cause__ = cause
    return error
