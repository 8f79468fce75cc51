"""Samples that cannot be read: what is said of them, and which others stand in."""

from __future__ import annotations

from collections.abc import Callable

import cv2

from pipeline.data.dataset import Split
from pipeline.data.hashing import key_of
from pipeline.data.order import Order
from pipeline.errors import DataError

BAD_SAMPLE = (
    ValueError,
    OSError,
    cv2.error,
    DataError,
)  # with which decoders, files and shards say that they are damaged
NEAR, FAR = 8, 56  # attempts in the same global batch, and in the whole epoch


def explain(cause: Exception, split: Split, sample: int) -> DataError:
    """One of `BAD_SAMPLE` as an error that names file, row and remedy."""
    what = (
        cause.cause
        if isinstance(cause, DataError)
        else f"the image cannot be decoded: {str(cause).strip()}"
    )
    remedy = "the shard has changed since it was made: delete it and run the prepare stage again"
    error = DataError(
        what,
        place=split.place(sample),
        remedy=cause.remedy if isinstance(cause, DataError) else remedy,
    )
    error.__cause__ = cause
    return error


class BadSampleReplacement:
    """Which sample stands in for one that cannot be read, as a function of (seed, epoch, position) alone.

    It is that of another place in the same global batch: whose shard is near, and whose class comes as often as the order
    has it. Only where several of those cannot be read either, one from anywhere in the epoch.
    """

    def __init__(self, order: Order, seed: int, global_batch: int) -> None:
        self.order, self.seed, self.global_batch = order, seed, global_batch

    def write(self, epoch: int, position: int, bad: DataError, write: Callable[[int], None]) -> int:
        """``write`` the first sample that can be read, and say which. Raises ``bad`` where none of the attempts can."""
        begin = position // self.global_batch * self.global_batch
        for attempt in range(NEAR + FAR):
            first, width = (begin, self.global_batch) if attempt < NEAR else (0, self.order.length)
            place = first + key_of("stand-in", self.seed, epoch, position, attempt) % width
            sample = self.order.index(epoch, place) % self.order.num_samples
            try:
                write(sample)
            except BAD_SAMPLE:
                continue
            return sample
        raise DataError(
            f"{bad.cause}; nor can {NEAR + FAR} others that might stand in for it",
            place=bad.place,
            remedy=bad.remedy,
        ) from bad
