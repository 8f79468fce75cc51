"""Small prepared datasets, written directly from synthetic images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.data.dataset import PreparedDataset, Split, open_dataset
from pipeline.data.description import DatasetDescription, SplitDescription
from pipeline.data.shards import FORMAT, GROUP_ROWS, Row, index_path, write_shard
from pipeline.files import digest, write_json
from pipeline.layout import CLASSES_JSON


def picture(number: int, width: int, height: int) -> NDArray[np.uint8]:
    """A smooth coloured image, different for each number: uint8, shape (height, width, 3)."""
    grid = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(
        cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.uint8
    )


def jpeg(number: int, width: int, height: int, quality: int = 90) -> bytes:
    """The image of this number as a JPEG file."""
    return bytes(simplejpeg.encode_jpeg(picture(number, width, height), quality=quality))


def row(number: int, classes: int, width: int = 48, height: int = 40) -> Row:
    """The row of image ``number``; its label is ``number % classes``."""
    data = jpeg(number, width, height)
    label = number % classes
    return Row(
        key=f"c{label}/{number}",
        label=label,
        width=width,
        height=height,
        hash=digest(data),
        image=data,
    )


def make_dataset(
    path: Path,
    counts: dict[str, int],
    classes: int = 4,
    shard_rows: int = 300,
    size: tuple[int, int] = (48, 40),
) -> PreparedDataset:
    """Write a dataset with ``counts[split]`` images per split, and open it.

    Images are numbered across the splits: {"train": 10, "validation": 2} gives the validation
    images the numbers 10 and 11. ``size``: width and height in pixels.
    """
    splits: dict[str, SplitDescription] = {}
    first = 0
    for split, count in counts.items():
        rows = [row(number, classes, *size) for number in range(first, first + count)]
        first += count
        splits[split] = _write_split(path, split, rows, classes, shard_rows)
    write_json(
        path / "classes.json",
        [{"index": i, "id": f"c{i}", "name": f"class {i}"} for i in range(classes)],
    )
    DatasetDescription(
        format=FORMAT,
        fingerprint="test",
        seed=0,
        layout="class_folders",
        splits=splits,
        classes=classes,
    ).write(path)
    return open_dataset(path)


def _write_split(
    path: Path, split: str, rows: Sequence[Row], classes: int, shard_rows: int
) -> SplitDescription:
    shards = []
    for number, start in enumerate(range(0, len(rows), shard_rows)):
        file = path / f"{split}-{number:05d}.parquet"
        shards.append(write_shard(file, in_groups(rows[start : start + shard_rows]), "test"))
    labels = np.array([row.label for row in rows], dtype=np.int64)
    return SplitDescription(
        images=len(rows),
        images_by_class=np.bincount(labels, minlength=classes).tolist(),
        shards=shards,
    )


def rename_classes(dataset: Path, names: Sequence[str]) -> None:
    """Give the classes of a prepared dataset other names, in its order."""
    entries = [{"index": i, "id": name, "name": name} for i, name in enumerate(names)]
    write_json(dataset / CLASSES_JSON, entries)
    DatasetDescription.read(dataset).write(dataset)  # with the digest of that file


def damage(split: Split, samples: Sequence[int]) -> None:
    """Overwrite the first bytes of these images in their shards."""
    for sample in samples:
        file, number = split.place(sample).rsplit(", row ", 1)
        with open(file, "r+b") as shard:
            shard.seek(int(np.load(index_path(Path(file)))[0, int(number)]))
            shard.write(b"\0" * 16)


def in_groups(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """The rows in row groups of GROUP_ROWS."""
    return [rows[start : start + GROUP_ROWS] for start in range(0, len(rows), GROUP_ROWS)]
