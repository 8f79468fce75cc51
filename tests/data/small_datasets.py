"""Small prepared datasets, made directly from arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.data.dataset import PreparedDataset, Split, open_dataset
from pipeline.data.shards import FORMAT, GROUP_ROWS, Row, index_path, write_shard
from pipeline.files import digest, write_json


def picture(number: int, width: int, height: int) -> NDArray[np.uint8]:
    """A smooth coloured picture, different for each number."""
    grid = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(
        cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.uint8
    )


def jpeg(number: int, width: int, height: int, quality: int = 90) -> bytes:
    return bytes(simplejpeg.encode_jpeg(picture(number, width, height), quality=quality))


def row(number: int, classes: int, width: int = 48, height: int = 40) -> Row:
    data = jpeg(number, width, height)
    return Row(f"c{number % classes}/{number}", number % classes, width, height, digest(data), data)


def make_dataset(
    path: Path,
    counts: dict[str, int],
    classes: int = 4,
    shard_rows: int = 300,
    size: tuple[int, int] = (48, 40),
) -> PreparedDataset:
    """A prepared dataset with `counts[split]` images; image i of the whole has label i % classes."""
    splits, number = {}, 0
    for split, count in counts.items():
        rows = [row(number + i, classes, *size) for i in range(count)]
        number += count
        shards = []
        for s, start in enumerate(range(0, count, shard_rows)):
            part = rows[start : start + shard_rows]
            shards.append(
                write_shard(path / f"{split}-{s:05d}.parquet", _groups(part), "test").as_dict()
            )
        splits[split] = {"images": count, "shards": shards}
    write_json(path / "dataset.json", {"format": FORMAT, "fingerprint": "test", "splits": splits})
    write_json(
        path / "classes.json",
        [{"index": i, "id": f"c{i}", "name": f"class {i}"} for i in range(classes)],
    )
    return open_dataset(path)


def damage(split: Split, samples: Sequence[int]) -> None:
    """Overwrite the beginnings of these images in their shards."""
    for sample in samples:
        file, row = split.place(sample).rsplit(", row ", 1)
        with open(file, "r+b") as shard:
            shard.seek(int(np.load(index_path(Path(file)))[0, int(row)]))
            shard.write(b"\0" * 16)


def _groups(rows: Sequence[Row]) -> list[Sequence[Row]]:
    return [rows[start : start + GROUP_ROWS] for start in range(0, len(rows), GROUP_ROWS)]
