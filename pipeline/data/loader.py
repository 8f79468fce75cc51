"""Loaders: threads decode and augment straight into a ring of preallocated uint8 batches.

Decoders and OpenCV release the GIL, so threads do what other loaders need processes for: no pickling, no copies, one map of
the shards. What a batch holds is a function of (seed, epoch, position) alone; threads only decide when.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import AugmentConfig
from pipeline.data.augment import EvalTransform, TrainTransform
from pipeline.data.bad_samples import BAD_SAMPLE, BadSampleReplacement, explain
from pipeline.data.dataset import Split
from pipeline.data.decode import Image
from pipeline.data.order import GlobalOrder, Order
from pipeline.data.prefetch import PREFETCH_BYTES, Batch, BatchPlan, PrefetchQueue, Write
from pipeline.errors import ConfigError, DataError

__all__ = ["Batch", "EvalLoader", "TrainLoader"]


class _Loader:
    """What the two loaders share: a ring that is closed in the end."""

    _ring: PrefetchQueue

    @property
    def data_wait(self) -> float:
        """Seconds that the consumer has waited for images so far."""
        return self._ring.data_wait

    @property
    def replaced_samples(self) -> int:
        """Images of this rank's batches so far that stand in for ones that cannot be read."""
        return self._ring.replaced

    def new_reasons(self) -> list[str]:
        """File, row and cause of a few of those replaced since it was last asked."""
        reasons = list(self._ring.reasons)
        self._ring.reasons.clear()
        return reasons

    def close(self) -> None:
        """End the threads; the loader is of no use afterwards."""
        self._ring.close()

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
    """Endless training batches, epoch after epoch, from any step on.

    Global batch b of an epoch is the positions [b * global_batch, (b + 1) * global_batch) of its order, whatever the number
    of ranks; each rank takes its contiguous share of it, as consecutive micro batches. The last partial batch is dropped.

    Args:
        image_size: side of the square images (pixels). global_batch, micro_batch: images.
        start_step: global optimizer step to begin with.
        order: of the split's samples; by default a permutation of all of them. prefetch_bytes: of batches in memory.
        on_bad_sample: what happens where an image cannot be read: 'stop' raises, 'replace' takes another one (`BadSampleReplacement`),
            augmented with the same random numbers; its place's sample and label are then those of the other one.
    Raises:
        ConfigError: the global batch cannot be divided so. DataError: fewer images than one global batch; or, while
        iterating, an image that cannot be read.
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
    ) -> None:
        if global_batch % (world_size * micro_batch):
            raise ConfigError(
                f"a global batch of {global_batch} images is no multiple of {world_size} processes x {micro_batch} images",
                remedy="change global_batch or micro_batch",
            )
        length = len(split) if order is None else order.length
        if length < global_batch:
            raise DataError(
                f"{length} training images are fewer than one global batch of {global_batch}",
                place=str(split.directory),
                remedy="lower global_batch, or add images",
            )
        self.global_batch, self.micro_batch, self.rank, self.world_size = (
            global_batch,
            micro_batch,
            rank,
            world_size,
        )
        self.steps_per_epoch = length // global_batch
        self._order = GlobalOrder(length, seed) if order is None else order
        self._split, self._transform = split, TrainTransform(image_size, augment, seed)
        self._stand_ins = (
            BadSampleReplacement(self._order, seed, global_batch)
            if on_bad_sample == "replace"
            else None
        )
        self._ring = PrefetchQueue(split, micro_batch, image_size, threads, prefetch_bytes)
        self._batches = self._ring.run(self._plans(start_step))

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    def rewind(self, step: int) -> Iterator[Batch]:
        """Begin anew at a global optimizer step; the iteration that was under way is over."""
        self._batches = self._ring.run(self._plans(step))
        return self._batches

    def _plans(self, start_step: int) -> Iterator[BatchPlan]:
        share = self.global_batch // self.world_size
        announced: list[int] = []
        for step in count(start_step):
            epoch, batch = divmod(step, self.steps_per_epoch)
            shards = self._order.shards_near(epoch, batch * self.global_batch)
            if shards != announced:
                self._split.ahead(shards)
                announced = shards
            first = batch * self.global_batch + self.rank * share
            for start in range(first, first + share, self.micro_batch):
                views = self._order.indices(epoch, start, start + self.micro_batch)
                positions = np.arange(start, start + self.micro_batch, dtype=np.int64)
                replaced: list[str] = []
                samples = views % self._order.num_samples
                write = self._writer(epoch, samples, views, start, replaced)
                yield BatchPlan(samples, views, positions, epoch, step, write, replaced)

    def _writer(
        self,
        epoch: int,
        samples: NDArray[np.int64],
        views: NDArray[np.int64],
        start: int,
        replaced: list[str],
    ) -> Write:
        draws = self._transform.draws(epoch, views)
        images, transform, numbers, stand_ins = (
            self._split.image,
            self._transform,
            samples.tolist(),
            self._stand_ins,
        )

        def write(i: int, out: Image) -> None:
            try:
                transform(images(numbers[i]), draws[i], out)
            except BAD_SAMPLE as cause:
                if stand_ins is None:
                    raise
                bad = explain(cause, self._split, numbers[i])
                samples[i] = stand_ins.write(
                    epoch, start + i, bad, lambda other: transform(images(other), draws[i], out)
                )
                replaced.append(f"{bad.place}: {bad.cause}")

        return write


class EvalLoader(_Loader):
    """One pass over a split: every image exactly once over all ranks, no padding; the last batch may be smaller.

    ``num_batches`` is this rank's number of batches, ``max_batches`` the largest of all ranks' (they differ by at most one):
    where every forward is a collective, a rank that has fewer joins in with an empty one.

    Args:
        image_size: side of the square images (pixels). resize: short side before the crop, as a factor of image_size.
        batch: images of a batch. threads: that decode.
    """

    def __init__(
        self,
        split: Split,
        *,
        image_size: int,
        resize: float,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
        prefetch_bytes: int = PREFETCH_BYTES,
    ) -> None:
        bounds = [len(split) * r // world_size for r in range(world_size + 1)]
        self._split, self._batch, self._bounds = split, batch, (bounds[rank], bounds[rank + 1])
        self.num_images = bounds[rank + 1] - bounds[rank]
        self.num_batches = math.ceil(self.num_images / batch)
        self.max_batches = max(
            math.ceil((bounds[r + 1] - bounds[r]) / batch) for r in range(world_size)
        )
        self._transform = EvalTransform(image_size, resize)
        self._ring = PrefetchQueue(split, batch, image_size, threads, prefetch_bytes)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return self._ring.run(self._plans())

    def _plans(self) -> Iterator[BatchPlan]:
        first, last = self._bounds
        for step, start in enumerate(range(first, last, self._batch)):
            samples = np.arange(start, min(start + self._batch, last), dtype=np.int64)
            yield BatchPlan(samples, samples, samples, 0, step, self._writer(start))

    def _writer(self, first: int) -> Write:
        def write(i: int, out: Image) -> None:
            self._transform(self._split.image(first + i), out)

        return write
