"""A quick look at a folder of images: layout, how many images and classes, their usual size. Reads headers only."""

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

IMAGES = {".jpg", ".jpeg", ".jpe", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
TRAIN, VALIDATION = ("train", "training"), ("val", "validation", "valid", "test")
SAMPLED_IMAGES = 64  # whose size is read
SAMPLED_TARS = 40  # that are counted; the rest is assumed to be like them by size
USUAL_SIDE = 224  # where no size can be read (pixels)


@dataclass(frozen=True)
class Source:
    """What a look at a source has found."""

    layout: str
    classes: int
    images: int  # of the training split, where there is one; approximate for many tars
    short_side: int  # median, pixels
    has_validation: bool

    @property
    def summary(self) -> str:
        split = "with a validation split" if self.has_validation else "no validation split"
        return (
            f"{self.images} images of {self.classes} classes ({self.layout.replace('_', ' ')}, {split}), "
            f"median short side {self.short_side} pixels"
        )


def look_at(root: str, layout: str, key: str, place: str) -> Source:
    """Look at a local folder of class folders or class tars. Raises ConfigError (``key`` at ``place``) if it is neither."""
    folder = Path(os.path.expanduser(root))
    if "://" in root or layout in ("huggingface", "imagenet_tars"):
        cause = f"{key}: 'auto' looks at local class folders and class tars only, not at {root} ({layout})"
        raise ConfigError(
            cause, place=place, remedy="give image_size, epochs and global_batch as numbers"
        )
    if not folder.is_dir():
        raise ConfigError(
            f"{key}: there is no folder {root}", place=place, remedy=f"--set {key}=DIR"
        )
    train = _split(folder, TRAIN) or folder
    has_validation = train != folder and _split(folder, VALIDATION) is not None
    finders = {"class_tars": _class_tars, "class_folders": _class_folders}
    wanted = [finders[layout]] if layout in finders else list(finders.values())
    try:
        found = next(
            (source for find in wanted if (source := find(train, has_validation)) is not None), None
        )
    except OSError as error:
        cause = f"{key}: {error.filename} cannot be read: {error.strerror}"
        raise ConfigError(cause, place=place, remedy="correct its rights") from None
    if found is None:
        what = layout.replace("_", " ") if layout in finders else "folders of images nor tars"
        cause = f"{key}: {root} holds no {what} (at the top, or below train/)"
        raise ConfigError(
            cause, place=place, remedy="one folder or one .tar a class, named by the class"
        )
    return found


def _split(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _class_folders(folder: Path, has_validation: bool) -> Source | None:
    counts: dict[Path, int] = {}
    for path in sorted(
        one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")
    ):
        count = sum(1 for _ in _images_below(path))
        if count:
            counts[path] = count
    if not counts:
        return None
    each = -(-SAMPLED_IMAGES // len(counts))
    sampled = [
        image
        for path in _spread(list(counts), SAMPLED_IMAGES)
        for image in islice(_images_below(path), each)
    ]
    return Source(
        "class_folders",
        len(counts),
        sum(counts.values()),
        _median(map(_short_side, sampled)),
        has_validation,
    )


def _images_below(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in IMAGES:
                yield Path(path, name)


def _class_tars(folder: Path, has_validation: bool) -> Source | None:
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        return None
    sampled = _spread(tars, SAMPLED_TARS)
    sizes: list[int] = []
    images = 0
    for path in sampled:
        count, found = _look_into(path, -(-SAMPLED_IMAGES // len(sampled)))
        images += count
        sizes += found
    if len(sampled) < len(tars):  # more tars than are counted: by their bytes
        images = round(
            images
            * sum(one.stat().st_size for one in tars)
            / max(1, sum(one.stat().st_size for one in sampled))
        )
    return (
        Source("class_tars", len(tars), images, _median(sizes), has_validation) if images else None
    )


def _look_into(path: Path, wanted: int) -> tuple[int, list[int]]:
    """Images in a tar, and the short sides of the first ``wanted``; a damaged tar counts as far as it can be read."""
    count = 0
    sizes: list[int] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or os.path.splitext(member.name)[1].lower() not in IMAGES:
                    continue
                count += 1
                if len(sizes) < wanted and (file := tar.extractfile(member)) is not None:
                    sizes.append(_short_side(file))
    except (tarfile.TarError, EOFError):
        return count, sizes
    return count, sizes


def _short_side(file: Path | IO[bytes]) -> int:
    """Short side of an image (pixels), read from its header; 0 where that cannot be read."""
    with warnings.catch_warnings():
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


def _median(sizes: Iterable[int]) -> int:
    known = [size for size in sizes if size]
    return int(statistics.median(known)) if known else USUAL_SIDE


def _spread(items: list[Path], most: int) -> list[Path]:
    """At most ``most`` items, evenly spread."""
    step = max(1.0, len(items) / most)
    return [items[int(index * step)] for index in range(min(len(items), most))]
