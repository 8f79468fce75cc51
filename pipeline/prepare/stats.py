"""What all units of a dataset come to, counted as they are done: nothing here grows with the number of images."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.prepare.extract import BuildContext, UnitRecord


class DatasetStats:
    """``images``: int64 (units,), kept of each unit. ``rejected``, ``changed`` and ``sides``: images by reason, by what was
    done to them and by short side (see ``UnitRecord``)."""

    def __init__(self, units: int) -> None:
        self.done = self.kept = self.bad = 0  # units, images, images
        self.images: NDArray[np.int64] = np.zeros(units, dtype=np.int64)
        self.rejected: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.sides: Counter[str] = Counter()
        self._moments = np.zeros((units, 6))
        self._examples: dict[str, dict[str, str]] = {}

    def add(self, unit: int, record: UnitRecord) -> None:
        self.done += 1
        self.kept += record.images
        self.bad += len(record.rejected)
        self.images[unit] = record.images
        self._moments[unit] = record.moments
        self.changed.update(record.changed)
        self.sides.update(record.sides)
        self.rejected.update(entry["reason"] for entry in record.rejected)
        for entry in record.rejected:
            self._examples.setdefault(entry["reason"], entry)

    def mean_and_std(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of each colour (3,); summed in the order of the units, whatever order they were done in."""
        mean, square = np.split(self._moments.sum(axis=0) / self.kept, 2)
        return mean, np.sqrt(np.maximum(square - mean**2, 0))

    def too_many_bad(self, place: BuildContext) -> DataError:
        total = self.kept + self.bad
        listed = "\n".join(
            f"    {count} x {reason}, such as {self._examples[reason]['key']} ({self._examples[reason]['detail']})"
            for reason, count in self.rejected.most_common(10)
        )
        remedy = f"look at {place.quarantine}; then mend the source, or raise max_rejected (now {place.config.max_rejected:g})"
        return DataError(
            f"{self.bad} of {total} images are unusable ({self.bad / total:.1%}):\n{listed}",
            place=place.config.root,
            remedy=remedy,
        )
