"""Loaders of training and evaluation batches: threads decode and augment into preallocated memory.

Decoders and OpenCV release the GIL, so threads do the work for which other loaders need processes:
there is no pickling, no copying between processes, and each shard is mapped once.

The content of a batch is a function of (seed, epoch, position); the number of ranks, threads and
micro-batches does not change it. Worked example: 100 samples, global_batch = 24, 2 ranks,
micro_batch = 6. An epoch has 100 // 24 = 4 steps; the last 4 positions are dropped. Step 5 is batch
1 of epoch 1, its positions are 24 to 47:

    rank 0   positions 24-29, then 30-35      (two micro-batches)
    rank 1   positions 36-41, then 42-47

With one rank and micro_batch = 24, one micro-batch holds the positions 24 to 47, with the same
images at the same positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from types import TracebackType
from typing import Literal, Self

import numpy as np

from pipeline.config.schema import AugmentConfig
from pipeline.data.augment import TrainTransform
from pipeline.data.bad_samples import BAD_SAMPLE, BadSampleReplacement, explain
from pipeline.data.dataset import Split
from pipeline.data.decode import Image
from pipeline.data.order import GlobalOrder, Order
from pipeline.data.prefetch import (
    PREFETCH_BYTES,
    Batch,
    BatchPlan,
    Int64,
    PrefetchQueue,
    WriteImage,
)
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import ConfigError, DataError

__all__ = ["Batch", "EvalLoader", "TrainLoader"]


class _Loader:
    """Common part of both loaders: a queue of prefetched batches, closed at the end."""

    _queue: PrefetchQueue

    @property
    def data_wait(self) -> float:
        """Seconds that the consumer has waited for batches so far."""
        return self._queue.data_wait

    @property
    def replaced_samples(self) -> int:
        """Number of samples in this rank's batches so far that replace unreadable ones."""
        return self._queue.replaced

    def new_reasons(self) -> list[str]:
        """File, row and cause of the newest replaced samples since the last call (a few)."""
        reasons = list(self._queue.reasons)
        self._queue.reasons.clear()
        return reasons

    def close(self) -> None:
        """End the threads. The loader cannot be used afterwards."""
        self._queue.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class TrainLoader(_Loader):
    """Endless training batches from any optimizer step on, epoch after epoch.

    Global batch b of an epoch holds the positions [b * global_batch, (b + 1) * global_batch) of its
    order. Each rank takes its contiguous share of them as consecutive micro-batches. The incomplete
    last batch of an epoch is dropped.

    Args:
        image_size: side of the square images, in pixels.
        global_batch: images per optimizer step, of all ranks.
        micro_batch: images per batch of this loader.
        start_step: global optimizer step to start with.
        order: order of the split's samples; by default a permutation of all of them.
        on_bad_sample: if an image cannot be read, "stop" raises the error. "replace" uses another
            sample (`BadSampleReplacement`) with the same augmentation draws; the batch then holds
            the sample number and label of that one.
        prefetch_bytes: memory limit for batches; at least two are always prefetched.
        pin_memory: page-locked memory, for a consumer on a GPU only: it creates a CUDA context.
    Raises:
        ConfigError: the global batch is not divisible by ranks and micro-batches.
        DataError: there are fewer images than one global batch; or, during iteration, an image
            cannot be read.
    """

    def __init__(
        self,
        split: Split,
        *,
        seed: int,
        image_size: int,
        augment: AugmentConfig,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
        start_step: int = 0,
        order: Order | None = None,
        on_bad_sample: Literal["stop", "replace"] = "stop",
        prefetch_bytes: int = PREFETCH_BYTES,
        pin_memory: bool = False,
    ) -> None:
        length = len(split) if order is None else order.length
        if global_batch % (world_size * micro_batch):
            raise ConfigError(
                f"a global batch of {global_batch} images is no multiple of {world_size} processes "
                f"x {micro_batch} images",
                remedy="change global_batch or micro_batch",
            )
        if length < global_batch:
            raise DataError(
                f"{length} training images are fewer than one global batch of {global_batch}",
                place=str(split.directory),
                remedy="lower global_batch, or add images",
            )
        self._order = order if order is not None else GlobalOrder(length, seed)
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.steps_per_epoch = length // global_batch
        self._split = split
        self._transform = TrainTransform(image_size, augment, seed)
        self._replacement: BadSampleReplacement | None = None
        if on_bad_sample == "replace":
            self._replacement = BadSampleReplacement(self._order, seed, global_batch)
        self._queue = PrefetchQueue(
            split,
            batch=micro_batch,
            image_size=image_size,
            threads=threads,
            prefetch_bytes=prefetch_bytes,
            pin_memory=pin_memory,
        )
        self._batches = self._queue.run(self._plans(start_step))

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    def rewind(self, step: int) -> Iterator[Batch]:
        """Restart at a global optimizer step; ends the current iteration."""
        self._batches = self._queue.run(self._plans(step))
        return self._batches

    def _plans(self, start_step: int) -> Iterator[BatchPlan]:
        """The micro-batches of this rank, from a global optimizer step on."""
        images_per_rank = self.global_batch // self.world_size
        announced: list[int] = []
        # Batches are planned before they are decoded; those of this many steps before are decoded
        # on every rank: a rank that is one step ahead waits for the others.
        behind = math.ceil(self._queue.slots * self.micro_batch / images_per_rank) + 1
        for step in count(start_step):
            # 1. Where the step is: step 5 of 4 steps per epoch is batch 1 of epoch 1, and its
            #    first position is 1 * 24.
            epoch, batch = divmod(step, self.steps_per_epoch)
            batch_start = batch * self.global_batch

            # 2. Announce the shards that are needed from here on, whenever they change: a remote
            #    split downloads them while earlier batches are trained. Seen from a step whose
            #    batches are decoded, the window before is not needed any more: a cache for two
            #    windows has room for the next one. Windows so short that the step now planned lies
            #    beyond the next one are announced from here.
            shards = self._shards_near(step)
            decoded = self._shards_near(max(start_step, step - behind))
            if shards and shards[0] in decoded:
                shards = decoded
            if shards != announced:
                self._split.ahead(shards)
                announced = shards

            # 3. The contiguous share of this rank: rank 1 of 2 starts at 24 + 1 * 12.
            first = batch_start + self.rank * images_per_rank
            for start in range(first, first + images_per_rank, self.micro_batch):
                yield self._plan(epoch, step, start)

    def _shards_near(self, step: int) -> list[int]:
        """The shards that are needed at a step and next, most urgent first."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self._order.shards_near(epoch, batch * self.global_batch)

    def _plan(self, epoch: int, step: int, start: int) -> BatchPlan:
        """The micro-batch of the positions from ``start`` on."""
        stop = start + self.micro_batch
        views = self._order.indices(epoch, start, stop)
        samples = views % self._order.num_samples
        replaced: list[str] = []
        return BatchPlan(
            samples=samples,
            views=views,
            positions=np.arange(start, stop, dtype=np.int64),
            epoch=epoch,
            step=step,
            write=self._writer(epoch, start, views, samples, replaced),
            replaced=replaced,
        )

    def _writer(
        self, epoch: int, start: int, views: Int64, samples: Int64, replaced: list[str]
    ) -> WriteImage:
        """A function that writes one image of a micro-batch; called by several threads at once."""
        # Keyed by view and not by sample: a replacement is augmented with the draws of the image
        # that it replaces, and two repeats of a sample with different draws.
        draws = self._transform.draws(epoch, views)
        # The samples of the order. `write` changes the array where it replaces one.
        planned = samples.tolist()

        def write(i: int, out: Image) -> None:
            def write_sample(sample: int) -> None:
                self._transform(self._split.image(sample), draws[i], out)

            # Each thread writes other elements of `samples`, and appending to a list is atomic, so
            # no lock is needed. The consumer reads both only after the whole batch is finished.
            try:
                write_sample(planned[i])
            except BAD_SAMPLE as cause:
                if self._replacement is None:
                    raise
                bad = explain(cause, self._split, planned[i])
                samples[i] = self._replacement.write(epoch, start + i, bad, write_sample)
                replaced.append(f"{bad.place}: {bad.cause}")

        return write


class EvalLoader(_Loader):
    """One pass over a split: every image exactly once over all ranks, without padding.

    The last batch of a rank may be smaller. ``num_images`` and ``num_batches``: of this rank.
    ``max_batches``: the largest number of batches of any rank (they differ by at most one). If
    every forward pass is a collective, a rank with fewer batches joins in with a blank one.

    Example: 53 images, 2 ranks, batch = 8. Rank 0 has the images 0 to 25 in 4 batches (the last one
    with 2 images), rank 1 the images 26 to 52 in 4 batches (the last one with 3).

    Args:
        preprocessing: how images are prepared, and their size.
        batch: images per batch.
        threads: number of threads that decode.
        prefetch_bytes: memory limit for batches; at least two are always prefetched.
        pin_memory: page-locked memory, for a consumer on a GPU only: it creates a CUDA context.
    """

    def __init__(
        self,
        split: Split,
        *,
        preprocessing: Preprocessing,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
        prefetch_bytes: int = PREFETCH_BYTES,
        pin_memory: bool = False,
    ) -> None:
        # Rank r has the images [bounds[r], bounds[r + 1]). The shares differ by at most one image:
        # 53 images and 2 ranks give the bounds [0, 26, 53].
        bounds = [len(split) * r // world_size for r in range(world_size + 1)]
        batches = [math.ceil((bounds[r + 1] - bounds[r]) / batch) for r in range(world_size)]
        self.image_size = preprocessing.image_size
        self.num_images = bounds[rank + 1] - bounds[rank]
        self.num_batches = batches[rank]
        self.max_batches = max(batches)
        self._split = split
        self._batch = batch
        self._first = bounds[rank]
        self._last = bounds[rank + 1]
        self._transform = preprocessing.transform()
        self._queue = PrefetchQueue(
            split,
            batch=batch,
            image_size=preprocessing.image_size,
            threads=threads,
            prefetch_bytes=prefetch_bytes,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return self._queue.run(self._plans())

    def _plans(self) -> Iterator[BatchPlan]:
        for step, start in enumerate(range(self._first, self._last, self._batch)):
            samples = np.arange(start, min(start + self._batch, self._last), dtype=np.int64)
            yield BatchPlan(
                samples=samples,
                views=samples,
                positions=samples,
                epoch=0,
                step=step,
                write=self._writer(start),
            )

    def _writer(self, first: int) -> WriteImage:
        def write(i: int, out: Image) -> None:
            self._transform(self._split.image(first + i), out)

        return write
