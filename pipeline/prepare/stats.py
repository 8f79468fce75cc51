"""Statistics of a dataset, added up unit by unit.

Memory grows with the units, not with the images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import DatasetConfig
from pipeline.errors import DataError
from pipeline.prepare.context import BuildContext
from pipeline.prepare.extract import ExtractedUnit
from pipeline.prepare.quarantine import write_rejections
from pipeline.prepare.unit_record import QuarantineEntry
from pipeline.sources.member import LEFT_OUT
from pipeline.sources.units import Unit

LISTED_REASONS = 10  # commonest causes in the error message


class DatasetStats:
    """Counts and sums over the units that are done so far."""

    def __init__(self, units: int) -> None:
        self.units_done = 0
        self.units_read = 0  # from the source, by this call
        self.kept = 0  # images
        self.rejected = 0  # images
        self.left_out = 0  # files that are no images
        self.contents = [""] * units  # digests of the files in the source
        self.images_per_unit: NDArray[np.int64] = np.zeros(units, dtype=np.int64)  # kept ones
        self.rejected_by_reason: Counter[str] = Counter()
        self.changed_by_kind: Counter[str] = Counter()
        self.images_by_short_side: Counter[str] = Counter()  # in steps of 32 pixels
        self._moments = np.zeros((units, 6))
        self._examples: dict[str, QuarantineEntry] = {}  # the first rejected file per reason

    def add(self, unit: int, extracted: ExtractedUnit) -> None:
        record = extracted.record
        self.units_done += 1
        self.units_read += extracted.was_read
        self.kept += record.images
        self.rejected += len(record.rejected)
        self.left_out += len(record.left_out)
        self.contents[unit] = record.content
        self.images_per_unit[unit] = record.images
        self._moments[unit] = record.moments
        self.changed_by_kind.update(record.changed)
        self.images_by_short_side.update(record.sides)
        self.rejected_by_reason.update(entry["reason"] for entry in record.rejected)
        for entry in record.rejected:
            self._examples.setdefault(entry["reason"], entry)
        for entry in record.left_out[:1]:
            self._examples.setdefault(LEFT_OUT, entry)

    def left_out_in_words(self, context: BuildContext) -> str:
        """How many files are no images, with an example."""
        return (
            f"{self.left_out} files are no images and are left out, such as "
            f"{self._examples[LEFT_OUT]['key']} (all are listed in {context.left_out_list})"
        )

    def mean_and_std(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of each channel over all kept images, shape (3,) each.

        Floating-point sums depend on their order. Units finish in any order, so their sums are kept
        apart and added in the order of the units: the result is the same bytes on any number of
        workers.
        """
        # Var = E[x^2] - mean^2. Rounding may make it slightly negative for one-coloured images.
        mean, mean_square = np.split(self._moments.sum(axis=0) / self.kept, 2)
        return mean, np.sqrt(np.maximum(mean_square - mean**2, 0))

    def require_few_rejected(self, context: BuildContext, units: Sequence[Unit]) -> None:
        """Raise DataError if more images are rejected than ``max_rejected`` allows.

        The error has the commonest reasons and an example of each. The rejected images are listed
        in the quarantine first, for whoever has to decide what to do about them.
        """
        total = self.kept + self.rejected
        if self.rejected <= context.config.max_rejected * total:
            return
        write_rejections(context, units)
        lines = []
        for reason, count in self.rejected_by_reason.most_common(LISTED_REASONS):
            example = self._examples[reason]
            lines.append(f"    {count} x {reason}, such as {example['key']} ({example['detail']})")
        share = f"{self.rejected / total:.1%}"
        raise DataError(
            f"{self.rejected} of {total} images are unusable ({share}):\n" + "\n".join(lines),
            place=context.config.root,
            remedy=f"look at the images in {context.quarantine} (listed in "
            f"{context.quarantine_list.name}); then {self._settings_to_change(context.config)}, "
            "and rerun the same command: the images read so far are not read again. Or correct the "
            "source, which is read again then",
        )

    def _settings_to_change(self, config: DatasetConfig) -> str:
        """Example: "raise max_rejected (now 0.01) or lower min_side (now 32)"."""
        choices = [f"raise max_rejected (now {config.max_rejected:g})"]
        if self.rejected_by_reason["too_small"]:
            choices.append(f"lower min_side (now {config.min_side})")
        if self.rejected_by_reason["too_many_pixels"]:
            choices.append(f"raise max_pixels (now {config.max_pixels})")
        return " or ".join(choices)
