"""The labels of a Hugging Face dataset: which classes they are, and how many images have none."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real

from pipeline.errors import DataError
from pipeline.sources.units import SplitName

MISSING = ""  # the class of a row without a label


def class_names(feature: object) -> list[str]:
    """Names of a ``datasets.ClassLabel``; empty for any other feature."""
    return [str(name) for name in getattr(feature, "names", None) or []]


def class_id(names: Sequence[str], value: object) -> str:
    """The class of a label; MISSING for null, -1 (a hidden label), NaN and an index beyond.

    Raises:
        TypeError: the value is not one class: a list, for example.
    """
    if value is None:
        return MISSING
    if isinstance(value, str | bool):
        return str(value)
    if not isinstance(value, Real):
        raise TypeError(type(value).__name__)
    number = float(value)
    if not math.isfinite(number) or number < 0:
        return MISSING
    if number != int(number):
        raise TypeError("fraction")
    index = int(number)
    if names:
        return names[index] if index < len(names) else MISSING
    return str(index)


def count_classes(
    names: Sequence[str], labels: Sequence[tuple[object, int]], place: str
) -> Counter[str]:
    """Rows by class. Raises DataError for labels that are no classes.

    Args:
        labels: each label that occurs, and its number of rows.
        place: the column, for the error.
    """
    counts: Counter[str] = Counter()
    for value, rows in labels:
        try:
            counts[class_id(names, value)] += rows
        except TypeError as error:
            raise DataError(
                f"its labels are no classes but values such as {str(value)[:60]} ({error})",
                place=place,
                remedy="set label_column to a column with one class per image",
            ) from None
    return counts


def ordered(
    names: Sequence[str], counts: Mapping[SplitName, Counter[str]], *, are_text: bool
) -> list[str]:
    """All classes: those of the feature in its order, else those that occur, numbers by value."""
    if names:
        return list(names)
    ids = {name for images in counts.values() for name in images} - {MISSING}
    are_numbers = not are_text and all(name.isdigit() for name in ids)
    return sorted(ids, key=int) if are_numbers else sorted(ids)


def require_labels(counts: Mapping[SplitName, Counter[str]], place: str) -> None:
    """Raise DataError for rows without a label, with the counts of each split."""
    missing = {split: images[MISSING] for split, images in counts.items() if images[MISSING]}
    if not missing:
        return
    listed = ", ".join(
        f"{count} of {counts[split].total()} rows of the {split or 'training'} split"
        for split, count in missing.items()
    )
    raise DataError(
        f"labels are missing (null, negative or beyond the classes): {listed}",
        place=place,
        remedy="remove these rows, for example with dataset.filter, or leave the split out: "
        "splits: {train: NAME, validation: NAME}",
    )
