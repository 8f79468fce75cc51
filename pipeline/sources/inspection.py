"""Estimate layout, number of images and classes, and usual size of a local source.

Reads headers only.

The configuration calls this before anything is prepared, to choose values that are written as
'auto'.
"""

from __future__ import annotations

import os
import statistics
import struct
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

from PIL import Image

from pipeline.errors import ConfigError
from pipeline.sources import names
from pipeline.sources.source_config import SplitsSetting
from pipeline.sources.splits import divide

SAMPLED_IMAGES = 64  # images whose size is read
SAMPLED_TARS = 40  # tars whose members are counted; the count of the others is estimated by size
USUAL_SIDE = 224  # short side in pixels, if no size can be read


@dataclass(frozen=True, kw_only=True)
class SourceSummary:
    """Estimates about a source."""

    layout: str
    classes: int
    images: int  # of the training split if there is one; approximate for many tars
    short_side: int  # median, in pixels
    has_validation: bool

    @property
    def summary(self) -> str:
        """One line for the user."""
        split = "with a validation split" if self.has_validation else "no validation split"
        layout = self.layout.replace("_", " ")
        return (
            f"{self.images} images of {self.classes} classes ({layout}, {split}), "
            f"median short side {self.short_side} pixels"
        )


def inspect_source(
    root: str, layout: str, key: str, place: str, splits: SplitsSetting = None
) -> SourceSummary:
    """Inspect a local folder of class folders or class tars.

    Args:
        layout: class_tars, class_folders, or auto to try both.
        key: job key that names the root, for messages.
        place: where the job sets it (file and line), for messages.
        splits: the dataset's own division into splits.

    Raises:
        ConfigError: the folder is missing, unreadable, or of another layout.
    """
    folder = Path(os.path.expanduser(root))
    # Tars first: a folder of class tars may also hold folders, such as unpacked copies.
    inspectors = {"class_tars": _inspect_tars, "class_folders": _inspect_folders}
    if "://" in root or layout not in (*inspectors, "auto"):
        cause = (
            f"{key}: 'auto' inspects only local class folders and class tars, not {root} ({layout})"
        )
        remedy = "give image_size, epochs and global_batch as numbers"
        raise ConfigError(cause, place=place, remedy=remedy)
    if not folder.is_dir():
        raise ConfigError(
            f"{key}: there is no folder {root}", place=place, remedy=f"--set {key}=DIR"
        )
    wanted = [inspectors[layout]] if layout in inspectors else list(inspectors.values())
    try:
        division = divide(splits, _split_like(folder)).splits
        # Without training images, the first split tells the classes and sizes.
        train = division.get("train", division.get("", next(iter(division.values()))))
        for inspect in wanted:
            summary = inspect(folder / train, "validation" in division)
            if summary is not None:
                return summary
    except OSError as error:
        cause = f"{key}: {error.filename} cannot be read: {error.strerror}"
        raise ConfigError(cause, place=place, remedy="correct its permissions") from None
    missing = layout.replace("_", " ") if layout in inspectors else "folders of images nor tars"
    raise ConfigError(
        f"{key}: {root} holds no {missing} (at the top, or below train/)",
        place=place,
        remedy="provide one folder or one .tar per class, named by the class",
    )


def _split_like(folder: Path) -> list[str]:
    """Folders and class tars: what may be a split or a class."""
    return [
        path.name
        for path in sorted(folder.iterdir())
        if not names.is_hidden(path.name) and (path.is_dir() or names.is_class_tar(path.name))
    ]


def _inspect_folders(folder: Path, has_validation: bool) -> SourceSummary | None:
    """None if no folder holds an image."""
    class_folders = sorted(
        path for path in folder.iterdir() if path.is_dir() and not names.is_hidden(path.name)
    )
    counts = {path: sum(1 for _ in _images_below(path)) for path in class_folders}
    counts = {path: count for path, count in counts.items() if count}
    if not counts:
        return None
    # About 64 images in all: of 1000 classes, 64 give one each; of 3 classes, each gives 22.
    images_per_class = -(-SAMPLED_IMAGES // len(counts))
    sampled = [
        image
        for path in _evenly_spaced(list(counts), SAMPLED_IMAGES)
        for image in islice(_images_below(path), images_per_class)
    ]
    return SourceSummary(
        layout="class_folders",
        classes=len(counts),
        images=sum(counts.values()),
        short_side=_median(map(_short_side, sampled)),
        has_validation=has_validation,
    )


def _images_below(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if names.is_image(name):
                yield Path(path, name)


def _inspect_tars(folder: Path, has_validation: bool) -> SourceSummary | None:
    """None if no tar holds an image."""
    tars = sorted(
        path
        for path in folder.iterdir()
        if names.is_class_tar(path.name) and not names.is_hidden(path.name)
    )
    if not tars:
        return None
    sampled = _evenly_spaced(tars, SAMPLED_TARS)
    sizes_per_tar = -(-SAMPLED_IMAGES // len(sampled))
    short_sides: list[int] = []
    images = 0
    for path in sampled:
        count, sides = _count_members(path, sizes_per_tar)
        images += count
        short_sides += sides
    if len(sampled) < len(tars):
        # Not every tar was counted. Assume equally many images per byte in the others: 40 of 1000
        # tars with 50,000 images in 5 GB, and 130 GB in all, make 50,000 * 130 / 5 images.
        all_bytes = sum(path.stat().st_size for path in tars)
        sampled_bytes = sum(path.stat().st_size for path in sampled)
        images = round(images * all_bytes / max(1, sampled_bytes))
    if not images:
        return None
    return SourceSummary(
        layout="class_tars",
        classes=len(tars),
        images=images,
        short_side=_median(short_sides),
        has_validation=has_validation,
    )


def _count_members(path: Path, num_sizes: int) -> tuple[int, list[int]]:
    """(number of images in a tar, short sides of the first ``num_sizes``).

    Damage ends the count.
    """
    count = 0
    short_sides: list[int] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or not names.is_image(member.name):
                    continue
                count += 1
                if len(short_sides) < num_sizes and (file := tar.extractfile(member)) is not None:
                    short_sides.append(_short_side(file))
    except (tarfile.TarError, EOFError):
        return count, short_sides  # preparation reports the damage
    return count, short_sides


def _short_side(file: Path | IO[bytes]) -> int:
    """Short side of an image in pixels, from its header; 0 if it cannot be read."""
    with warnings.catch_warnings():
        # Pillow warns of huge images. Only the header is read here, so they cost nothing.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                return min(image.size)
        except (
            OSError,
            ValueError,
            SyntaxError,
            struct.error,
            Image.DecompressionBombError,
            tarfile.TarError,
        ):
            return 0


def _median(short_sides: Iterable[int]) -> int:
    known = [side for side in short_sides if side]
    return int(statistics.median(known)) if known else USUAL_SIDE


def _evenly_spaced(items: list[Path], most: int) -> list[Path]:
    """At most ``most`` of the items, evenly spaced: 2 of [a, b, c, d] are [a, c]."""
    step = max(1.0, len(items) / most)
    return [items[int(index * step)] for index in range(min(len(items), most))]
