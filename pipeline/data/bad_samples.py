"""Samples that cannot be read: the error that names them, and the samples that replace them."""

from __future__ import annotations

from collections.abc import Callable

import cv2

from pipeline.data.dataset import Split
from pipeline.data.hashing import key_of
from pipeline.data.local_shards import PREPARE_AGAIN
from pipeline.data.order import Order
from pipeline.errors import DataError

# What decoders (ValueError, cv2.error), files (OSError) and shards (DataError) raise for damage.
BAD_SAMPLE = (ValueError, OSError, cv2.error, DataError)
BATCH_ATTEMPTS = 8  # replacements tried from the same global batch
EPOCH_ATTEMPTS = 56  # then from the whole epoch
ATTEMPTS = BATCH_ATTEMPTS + EPOCH_ATTEMPTS


def explain(cause: Exception, split: Split, sample: int) -> DataError:
    """One of `BAD_SAMPLE` as a DataError that names file and row; ``cause`` becomes its cause."""
    if isinstance(cause, DataError):
        text = cause.cause
        remedy = cause.remedy
    else:
        text = f"the image cannot be decoded: {str(cause).strip()}"
        remedy = f"the shard changed after preparation: {PREPARE_AGAIN}"
    error = DataError(text, place=split.place(sample), remedy=remedy)
    error.__cause__ = cause
    return error


class BadSampleReplacement:
    """Chooses the sample that replaces one that cannot be read.

    The choice is a function of (seed, epoch, position), so that all ranks, all numbers of threads
    and a resumed run replace it by the same sample.

    The replacement comes from another position of the same global batch. Its shard is at hand
    anyway (windowed order), and its class appears as often as the order wants it to. Only if
    `BATCH_ATTEMPTS` of those cannot be read either, it comes from anywhere in the epoch.

    Example: global_batch = 256. The sample at position 700 is damaged. Its global batch covers the
    positions 512 to 767; if attempt 0 draws position 530, the sample shown there replaces it.
    """

    def __init__(self, order: Order, seed: int, global_batch: int) -> None:
        self.order = order
        self.seed = seed
        self.global_batch = global_batch

    def write(
        self, epoch: int, position: int, bad: DataError, write_sample: Callable[[int], None]
    ) -> int:
        """Write the first replacement that can be read, and return its sample number.

        Args:
            position: position of the damaged sample in the epoch.
            bad: the error of the damaged sample.
            write_sample: decodes a sample into the batch; raises one of `BAD_SAMPLE`.
        Raises:
            DataError: none of `ATTEMPTS` replacements can be read; names the damaged sample.
        """
        for attempt in range(ATTEMPTS):
            sample = self._candidate(epoch, position, attempt)
            try:
                write_sample(sample)
            except BAD_SAMPLE:  # damaged as well; or the same sample, if it is drawn again
                continue
            return sample
        raise DataError(
            f"{bad.cause}; none of {ATTEMPTS} replacement images can be read either",
            place=bad.place,
            remedy=bad.remedy,
        ) from bad

    def _candidate(self, epoch: int, position: int, attempt: int) -> int:
        first = 0
        width = self.order.length
        if attempt < BATCH_ATTEMPTS:
            first = position // self.global_batch * self.global_batch
            width = self.global_batch
        # "stand-in" is part of the random stream: another word would choose other samples.
        draw = key_of("stand-in", self.seed, epoch, position, attempt)
        view = self.order.index(epoch, first + draw % width)
        return view % self.order.num_samples
