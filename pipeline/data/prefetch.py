"""Threads that fill preallocated batches ahead of the consumer, in the order of their plans.

The memory of a batch is a *slot*. There are `CONSUMER_BATCHES` (2) slots for the consumer, plus the
prefetched ones. A slot goes through three states::

    free --submit--> pending --yield--> in use --two batches later--> free
                     (threads fill it)  (the consumer's)

Worked example with four slots (two of them prefetched) and the batches b0, b1, b2, ...; the state
while the consumer works with the batch that it just received:

    consumer has   pending     in use   free   what happened in between
    (start)        -           -        4
    b0             b1 b2 b3    b0       0      b0 to b3 submitted, waited for b0
    b1             b2 b3       b0 b1    0      waited for b1
    b2             b3 b4       b1 b2    0      the slot of b0 reused for b4
    b3             b4 b5       b2 b3    0      the slot of b1 reused for b5

So a batch stays valid while the consumer works with the next one. It is overwritten when the
consumer asks for the batch after the next, and never before a copy to the device has finished:
`Batch.to` records an event behind the copy, and the thread that overwrites the slot waits for it.
The consumer waits for nothing but decoded images. Free slots are used oldest first, so that the
copy has usually ended long before.

Batches are yielded in the order of the plans, although threads finish them in any order: the
consumer waits for the oldest pending slot. Threads decide only *when* a batch is filled, its plan
decides *what* it holds.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.bad_samples import BAD_SAMPLE, explain
from pipeline.data.dataset import Split
from pipeline.data.decode import Image

Int64 = NDArray[np.int64]

PREFETCH_BYTES = 512 << 20  # default memory limit per process
MIN_PREFETCH = 2  # batches
MAX_PREFETCH = 8  # batches
CONSUMER_BATCHES = 2  # batches that the consumer may use at the same time
MAX_CHUNK = 16  # images per task of a thread
MAX_REASONS = 5  # reasons of replaced samples that are kept until somebody asks

WriteImage = Callable[[int, Image], None]  # decodes and augments image i of a batch into an array


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of n images.

    ``images``: uint8, shape (n, H, W, 3), RGB. Its memory is reused for the batch after the next
    one, so copy what is needed for longer. ``labels``, ``samples`` (rows of the split), ``views``
    (sample and repeat, the key of the augmentation) and ``positions`` (in the epoch): int64, shape
    (n,). ``epoch`` and ``step`` (global optimizer step) count from 0. ``copied``: called by `to`
    behind the copies.
    """

    images: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor
    views: torch.Tensor
    positions: torch.Tensor
    epoch: int
    step: int
    copied: Callable[[], None] = lambda: None

    def to(self, device: torch.device) -> Batch:
        """Copy what a step needs to the device. Does not wait for the copies."""
        # ``samples`` stays on the host: augmentation is keyed by view, not by sample.
        names = ("images", "labels", "views", "positions")
        copies = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        self.copied()
        return replace(self, **copies)


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """A batch before it is filled: which samples it holds, and how to write its images.

    ``write`` may replace a sample that cannot be read: it then changes the element of ``samples``
    and adds the reason to ``replaced``.
    """

    samples: Int64
    views: Int64
    positions: Int64
    epoch: int
    step: int
    write: WriteImage
    replaced: list[str] = field(default_factory=list)


class _Slot:
    """Memory for the images of one batch, and the progress of filling it."""

    def __init__(self, batch: int, image_size: int, pin: bool) -> None:
        shape = (batch, image_size, image_size, 3)
        self.images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
        self.pixels: Image = self.images.numpy()  # the same memory
        self.done = threading.Event()
        self.error: BaseException | None = None
        self._copied: torch.cuda.Event | None = None  # the device has copied the last batch
        self._missing = 0  # images that are not written yet
        self._lock = threading.Lock()

    def begin(self, images: int) -> None:
        """Prepare the slot for a new batch."""
        self.done.clear()
        self._missing = images
        self.error = None

    def finish(self, images: int, error: BaseException | None) -> None:
        """Count written images; keeps the first error."""
        with self._lock:
            self._missing -= images
            self.error = self.error or error
            if self._missing == 0:
                self.done.set()

    def record_copy(self) -> None:
        """Mark the point behind the copies that the consumer has queued on the device."""
        if self.images.is_pinned():
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait_for_copy(self) -> None:
        """Wait until the device has copied the batch before; called by the threads that write.

        A copy from pinned memory runs in the background. Overwriting the images before it has
        finished would mix two batches.
        """
        copied = self._copied
        if copied is not None:
            copied.synchronize()


@dataclass(frozen=True, kw_only=True)
class _Task:
    """Images [start, stop) of a batch."""

    plan: BatchPlan
    slot: _Slot
    start: int
    stop: int


class PrefetchQueue:
    """Threads and slots that turn plans into batches.

    All slots together take at most ``prefetch_bytes``, but there are never fewer than
    `CONSUMER_BATCHES` + `MIN_PREFETCH` of them. ``pin_memory``: for a consumer on a GPU, because
    page-locked memory is copied in the background.

    ``data_wait``: seconds that the consumer waited for batches so far. ``replaced``: number of
    replaced samples in the batches yielded so far. ``reasons``: the newest reasons of these.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch: int,
        image_size: int,
        threads: int,
        prefetch_bytes: int,
        pin_memory: bool = False,
    ) -> None:
        cv2.setNumThreads(1)  # the threads of this queue are the parallelism
        self.split = split
        self.data_wait = 0.0
        self.replaced = 0
        self.reasons: deque[str] = deque(maxlen=MAX_REASONS)
        # At least two tasks per thread and batch, so that the threads finish a batch together.
        self._chunk = max(1, min(MAX_CHUNK, batch // (2 * threads)))
        # Batches that are planned but not yet trained, at most.
        self.slots = CONSUMER_BATCHES + prefetch_batches(3 * batch * image_size**2, prefetch_bytes)
        # Oldest first: the slot that was used longest ago.
        self._free = deque(_Slot(batch, image_size, pin_memory) for _ in range(self.slots))
        self._pending: deque[tuple[BatchPlan, _Slot]] = deque()
        self._in_use: deque[_Slot] = deque()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run_tasks, name=f"loader-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, plans: Iterator[BatchPlan]) -> Iterator[Batch]:
        """Yield the batches of ``plans`` in their order. A new call ends the iteration before.

        Raises:
            DataError: an image cannot be read.
        """
        self._discard_pending()
        while not self._closed:
            while len(self._in_use) >= CONSUMER_BATCHES:
                self._free.append(self._in_use.popleft())
            while self._free and (plan := next(plans, None)) is not None:
                self._submit(plan, self._free.popleft())
            if not self._pending:
                return
            plan, slot = self._pending.popleft()
            began = time.perf_counter()
            slot.done.wait()
            self.data_wait += time.perf_counter() - began
            if slot.error is not None:
                self._free.append(slot)
                raise slot.error
            self._in_use.append(slot)
            self.replaced += len(plan.replaced)
            self.reasons.extend(plan.replaced)
            yield self._batch(plan, slot)

    def close(self) -> None:
        """End the threads. Images that are being decoded are finished first."""
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

    def _discard_pending(self) -> None:
        """Wait for the batches of an abandoned iteration, and free their slots."""
        while self._pending:
            _, slot = self._pending.popleft()
            slot.done.wait()  # the threads must not write into a slot that is used again
            self._free.append(slot)

    def _submit(self, plan: BatchPlan, slot: _Slot) -> None:
        images = len(plan.samples)
        slot.begin(images)
        self._pending.append((plan, slot))
        for start in range(0, images, self._chunk):
            stop = min(start + self._chunk, images)
            self._tasks.put(_Task(plan=plan, slot=slot, start=start, stop=stop))

    def _batch(self, plan: BatchPlan, slot: _Slot) -> Batch:
        # Only now: while the slot was pending, `write` may have replaced samples.
        return Batch(
            images=slot.images[: len(plan.samples)],
            labels=torch.from_numpy(self.split.labels[plan.samples]),
            samples=torch.from_numpy(plan.samples),
            views=torch.from_numpy(plan.views),
            positions=torch.from_numpy(plan.positions),
            epoch=plan.epoch,
            step=plan.step,
            copied=slot.record_copy,
        )

    def _run_tasks(self) -> None:
        """Body of a thread: run tasks until `close` sends None."""
        while (task := self._tasks.get()) is not None:
            # An error is not raised here, where nobody would see it, but in `run`. The remaining
            # images of the task are not written; they count as finished, or `run` would wait.
            task.slot.finish(task.stop - task.start, self._write(task))

    def _write(self, task: _Task) -> BaseException | None:
        """Write the images of a task; the error that ended it, if any."""
        task.slot.wait_for_copy()
        for i in range(task.start, task.stop):
            try:
                task.plan.write(i, task.slot.pixels[i])
            except BAD_SAMPLE as error:
                return explain(error, self.split, int(task.plan.samples[i]))
            except Exception as error:
                return error
        return None


def prefetch_batches(batch_bytes: int, prefetch_bytes: int) -> int:
    """Number of batches to prefetch besides the consumer's.

    Example: a limit of 700 bytes holds 7 batches of 100 bytes. The consumer has 2 of them, so 5 are
    prefetched.
    """
    fitting = prefetch_bytes // batch_bytes - CONSUMER_BATCHES
    return max(MIN_PREFETCH, min(MAX_PREFETCH, fitting))
