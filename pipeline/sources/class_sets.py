"""Compares the classes of a source's splits: images for evaluation need training images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from pipeline.errors import DataError
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import Part, SplitName
from pipeline.suggest import closest

_NAMED = 5  # classes in a message
_ALIKE = 0.8  # likeness from which on a name may be a slip of the other


Counts = Mapping[SplitName, Counter[str]]  # images by class, by split


def images_by_class(parts: Iterable[Part]) -> Counter[str]:
    """Images of each class in parts of one class each; of a tar, 1 stands for any number."""
    counts: Counter[str] = Counter()
    for part in parts:
        counts[part.group] += part.images if part.images is not None else int(part.last > 0)
    return counts


def require_same(counts: Counts, config: SourceConfig) -> None:
    """Raise DataError for images of a class that has no training image.

    Example: train/Cat and val/cat. Both would become classes, one without training images and one
    that is never evaluated.
    """
    trained = +(counts.get("train", Counter()) + counts.get("", Counter()))
    if not trained:
        return
    for split, images in counts.items():
        unknown = sorted(set(+images) - set(trained))
        if not unknown:
            continue
        listed = ", ".join(_with_hint(name, trained) for name in unknown[:_NAMED])
        others = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        raise DataError(
            f"{len(unknown)} classes of the {split} images have no training images: "
            f"{listed}{others}",
            place=config.root,
            remedy="correct the names, add training images, or move these classes away",
        )


def notes(counts: Counts) -> list[str]:
    """Classes without images, and training classes that are not evaluated."""
    lines = []
    present = {name for images in counts.values() for name in images}
    empty = sorted(present - {name for images in counts.values() for name in +images})
    if empty:
        lines.append(f"{len(empty)} classes have no image: {', '.join(empty[:_NAMED])}")
    for split in ("validation", "test"):
        if split not in counts or "train" not in counts:
            continue
        missing = sorted(set(+counts["train"]) - set(+counts[split]))
        if missing:
            names = ", ".join(missing[:_NAMED])
            lines.append(f"{len(missing)} training classes have no {split} images: {names}")
    return lines


def _with_hint(name: str, trained: Iterable[str]) -> str:
    """The name, and a training class that may be meant: "dgo (dog?)"."""
    names = {other.lower(): other for other in trained}
    match = name.lower() if name.lower() in names else closest(name.lower(), names, _ALIKE)
    return f"{name} ({names[match]}?)" if match else name
