"""Which split each image belongs to: that of its folder, or held out by a hash of its content.

The codes of the splits are ordered. An image may be seen by the splits above its own only:

    train        images that the network learns from
    selection    chooses the best checkpoint; held out from the training images
    validation   accuracy during training, and at the end if there is no test split
    test         accuracy at the end

An image is held out if the hash of its content, as a number in [0, 1), is below the share. Worked
example with ``validation_fraction: 0.2`` and ``selection_fraction: 0.5``; every split has a hash of
its own:

    image   hash of validation   hash of selection   split
    A       0.13                 0.71                validation
    B       0.65                 0.22                selection
    C       0.91                 0.84                train

Neither the other images nor the number of workers matter, so equal images are in the same split and
a new image moves no other one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import DatasetConfig
from pipeline.data.hashing import key_of, mix_array
from pipeline.sources.units import Unit

SPLITS = ("train", "selection", "validation", "test")  # a split's code is its index
TRAIN = 0
SELECTION = 1
VALIDATION = 2
TEST = 3

_CANDIDATE = np.dtype([("hash", "<u8"), ("high", "<u8"), ("low", "<u8")])


@dataclass(frozen=True, kw_only=True)
class Splitter:
    """The shares to hold out, and the seed of the hashes."""

    validation_fraction: float  # of the images of units without a split
    selection_fraction: float  # of the training images
    seed: int
    # Splits whose images are held out, so that a class may lose all of its training images.
    held_out: tuple[int, ...]

    @classmethod
    def of(cls, config: DatasetConfig, seed: int, units: Iterable[Unit]) -> Splitter:
        """The splitter of a dataset."""
        # With a test split, nobody reports the accuracy of the validation split as the result. It
        # may choose the checkpoint, and no training image has to be given up.
        names = {unit.split for unit in units}
        has_test = "test" in names
        # Images of a validation split of the source's own are never trained on. With a share of 1,
        # all images are for evaluation.
        divides = names <= {"", "test"} and config.validation_fraction < 1
        return cls(
            validation_fraction=config.validation_fraction,
            selection_fraction=0.0 if has_test else config.selection_fraction,
            seed=seed,
            held_out=(SELECTION, VALIDATION) if divides else (SELECTION,),
        )

    def codes(self, unit: Unit, contents: NDArray[np.uint64]) -> NDArray[np.int8]:
        """The split code of each image of a unit: int8 (images,).

        Args:
            contents: the lower half of each content hash; the buckets of the plan are ranges of the
                upper half.
        """
        own_code = SPLITS.index(unit.split or "train")
        codes = np.full(len(contents), own_code, dtype=np.int8)
        if own_code == TRAIN and self.selection_fraction:
            codes[self._is_held_out(contents, "selection", self.selection_fraction)] = SELECTION
        if not unit.split:
            codes[self._is_held_out(contents, "validation", self.validation_fraction)] = VALIDATION
        return codes

    def hashes(self, contents: NDArray[np.uint64], split: str) -> NDArray[np.uint64]:
        """A hash of each content for a split. Hashed again, because the seed must matter."""
        return mix_array(contents ^ np.uint64(key_of(split, self.seed)))

    def _is_held_out(
        self, contents: NDArray[np.uint64], split: str, fraction: float
    ) -> NDArray[np.bool_]:
        if fraction == 1:
            return np.ones(len(contents), dtype=bool)
        threshold = min(int(fraction * 2.0**64), 2**64 - 1)
        return np.asarray(self.hashes(contents, split) < np.uint64(threshold))


class LastTrainingImages:
    """Keeps one training image of every class: a class of few images may have lost all of them.

    Example: a class has the images A and B, and both are below the share of the selection split.
    The one with the larger hash, which a slightly smaller share would have left, goes back to
    training.

    Args:
        split: that gives images back, a code. Images of the splits above it count as training
            images: ``validation`` gives none back where ``selection`` can.
    """

    def __init__(self, splitter: Splitter, num_classes: int, split: int = SELECTION) -> None:
        self._splitter = splitter
        self._split = split
        self._has_training_image = np.zeros(num_classes, dtype=bool)
        # Of each class, the image of the split with the largest hash so far.
        self._candidates = np.zeros(num_classes, dtype=_CANDIDATE)
        self._has_candidate = np.zeros(num_classes, dtype=bool)

    def add(self, records: NDArray[np.void]) -> None:
        """Count kept records of the plan."""
        self._has_training_image[records["label"][records["split"] < self._split]] = True
        held_out = records[records["split"] == self._split]
        hashes = self._splitter.hashes(held_out["low"], SPLITS[self._split])
        # Sorted by hash, the last image of a class has its largest one. The hash is one of half the
        # content's digest; the other half decides between equal ones, in whatever order they come.
        by_hash = np.lexsort([held_out["high"], hashes])
        held_out = held_out[by_hash]
        hashes = hashes[by_hash]
        labels, from_end = np.unique(held_out["label"][::-1], return_index=True)
        last = len(held_out) - 1 - from_end
        best_hash = self._candidates["hash"][labels]
        best_high = self._candidates["high"][labels]
        better = (hashes[last] > best_hash) | (
            (hashes[last] == best_hash) & (held_out["high"][last] >= best_high)
        )
        labels = labels[better]
        last = last[better]
        self._candidates["hash"][labels] = hashes[last]
        for half in ("high", "low"):
            self._candidates[half][labels] = held_out[half][last]
        self._has_candidate[labels] = True

    def restored(self, records: NDArray[np.void]) -> NDArray[np.void]:
        """The records, with the split of a class's last image back to train.

        All images of its content move, whatever their class: the same picture must not train under
        one label and select under another.
        """
        needed = self._candidates[self._has_candidate & ~self._has_training_image]
        wanted = set(zip(needed["high"].tolist(), needed["low"].tolist(), strict=True))
        possible = np.flatnonzero(
            (records["split"] == self._split) & np.isin(records["low"], needed["low"])
        )
        for row in possible.tolist():
            if (int(records["high"][row]), int(records["low"][row])) in wanted:
                records["split"][row] = TRAIN
        return records
