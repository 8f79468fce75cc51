"""A quick look at a folder of images: layout, how many images and classes, their usual size. Reads headers only."""

from __future__ import annotations

import os
import statistics
import struct
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError

IMAGES = {".jpg", ".jpeg", ".jpe", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
TRAIN, VALIDATION = ("train", "training"), ("val", "validation", "valid", "test")
SAMPLED_IMAGES = 64  # whose size is read
SAMPLED_TARS = 40  # that are counted; the rest is assumed to be like them by size
HEADER = 1 << 16  # bytes of an image that hold its size


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
    """Look at a local folder of class folders or class tars. Raises ConfigError (naming ``key`` at ``place``) if it is neither."""
    folder = Path(os.path.expanduser(root))
    if "://" in root or layout in ("huggingface", "imagenet_tars"):
        cause = f"{key}: 'auto' looks at local class folders and class tars only, not at {root} ({layout})"
        raise ConfigError(cause, place=place, remedy="give image_size, epochs and global_batch as numbers")
    if not folder.is_dir():
        raise ConfigError(f"{key}: there is no folder {root}", place=place, remedy="--set data.root=DIR")
    train = _split(folder, TRAIN) or folder
    has_validation = train != folder and _split(folder, VALIDATION) is not None
    found = _class_tars(train, has_validation) or _class_folders(train, has_validation)
    if found is None:
        cause = f"{key}: {root} holds neither folders of images nor tars (at the top, or below train/)"
        raise ConfigError(cause, place=place, remedy="one folder or one .tar a class, named by the class")
    return found


def _split(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _class_folders(folder: Path, has_validation: bool) -> Source | None:
    counts: dict[Path, int] = {}
    for path in sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")):
        count = sum(1 for _ in _images_below(path))
        if count:
            counts[path] = count
    if not counts:
        return None
    each = -(-SAMPLED_IMAGES // len(counts))
    sizes = (_file_size(image) for path in _spread(list(counts), SAMPLED_IMAGES) for image in _first(_images_below(path), each))
    return Source("class_folders", len(counts), sum(counts.values()), _median(sizes), has_validation)


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
        images = round(images * sum(one.stat().st_size for one in tars) / max(1, sum(one.stat().st_size for one in sampled)))
    return Source("class_tars", len(tars), images, _median(sizes), has_validation) if images else None


def _look_into(path: Path, wanted: int) -> tuple[int, list[int]]:
    """Images in a tar, and the short sides of the first ``wanted``; a damaged tar counts as far as it can be read."""
    count, sizes = 0, []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or os.path.splitext(member.name)[1].lower() not in IMAGES:
                    continue
                count += 1
                file = tar.extractfile(member) if len(sizes) < wanted else None
                if file is not None and (size := image_size(file.read(HEADER))):
                    sizes.append(min(size))
    except (tarfile.TarError, OSError):
        return count, sizes
    return count, sizes


def _file_size(path: Path) -> int:
    try:
        with open(path, "rb") as file:
            size = image_size(file.read(HEADER))
    except OSError:
        return 0
    return min(size) if size else 0


def _median(sizes: Iterable[int]) -> int:
    known = [size for size in sizes if size]
    return int(statistics.median(known)) if known else 224


def _spread(items: list[Path], most: int) -> list[Path]:
    """At most ``most`` items, evenly spread."""
    step = max(1.0, len(items) / most)
    return [items[int(index * step)] for index in range(min(len(items), most))]


def _first(items: Iterator[Path], count: int) -> list[Path]:
    return [item for item, _ in zip(items, range(count), strict=False)]


def image_size(head: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels from the first bytes of a JPEG, PNG, GIF or BMP; None if they do not tell."""
    try:
        if head[:8] == b"\x89PNG\r\n\x1a\n":
            return struct.unpack(">II", head[16:24])  # type: ignore[return-value]
        if head[:3] == b"GIF":
            return struct.unpack("<HH", head[6:10])  # type: ignore[return-value]
        if head[:2] == b"BM":
            width, height = struct.unpack("<ii", head[18:26])
            return width, abs(height)
        if head[:2] == b"\xff\xd8":
            return _jpeg_size(head)
    except (struct.error, IndexError):
        return None
    return None


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    position = 2
    while position < len(head):
        if head[position] != 0xFF:
            return None
        marker = head[position + 1]
        if marker == 0xFF:  # padding
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", head[position + 5 : position + 9])
            return width, height
        else:
            position += 2 + int(struct.unpack(">H", head[position + 2 : position + 4])[0])
    return None
