"""Checks of a prepared dataset: every digest, every image's hash, every image decodable, all counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.data.dataset import open_dataset
from pipeline.data.decode import JPEG_MAGIC, decode_any, decode_jpeg
from pipeline.data.shards import index_path
from pipeline.errors import DataError
from pipeline.files import digest, file_digest
from pipeline.layout import DATASET_JSON
from pipeline.prepare.build import MapTasks
from pipeline.reporting import Progress


def verify_dataset(path: Path, tasks: MapTasks, progress: Progress) -> list[str]:
    """What is wrong with the dataset in ``path``, one sentence each, naming file and row; empty if all is well.

    Raises DataError where there is no dataset.
    """
    open_dataset(path)
    description = json.loads((path / DATASET_JSON).read_text())
    shards = [shard for split in description["splits"].values() for shard in split["shards"]]
    problems: list[str] = []
    for done, (_, found) in enumerate(tasks(partial(verify_shard, path), shards), 1):
        problems += found
        progress(f"{path.name}: verifying", done, len(shards), f"{len(problems)} problems")
    return sorted(problems) + list(_counts(description))


def verify_shard(path: Path, shard: dict[str, Any]) -> list[str]:
    """What is wrong with one shard."""
    file = path / shard["file"]
    for one, expected in ((file, shard["digest"]), (index_path(file), shard["index_digest"])):
        if not one.is_file():
            return [f"{one}: missing"]
        if file_digest(one) != expected:
            return [f"{one}: its content is not what was written (digest differs)"]
    problems = []
    index = np.load(index_path(file), allow_pickle=False)
    content = np.memmap(file, dtype=np.uint8, mode="r")
    hashes = pq.read_table(file, columns=["hash"])["hash"].to_pylist()
    for row, (offset, length) in enumerate(index[:2].T.tolist()):
        data = content[offset : offset + length].tobytes()
        if digest(data) != hashes[row]:
            problems.append(f"{file}, row {row}: the image is not what was written (hash differs)")
        elif (error := _undecodable(data)) is not None:
            problems.append(f"{file}, row {row}: {error}")
    return problems


def _undecodable(data: bytes) -> str | None:
    try:
        decode_jpeg(data) if data[:3] == JPEG_MAGIC else decode_any(data)
    except ValueError as error:
        return str(error)
    return None


def _counts(description: dict[str, Any]) -> Iterator[str]:
    for name, split in description["splits"].items():
        rows = sum(shard["rows"] for shard in split["shards"])
        if rows != split["images"] or sum(split["images_by_class"]) != rows:
            yield f"{name}: dataset.json counts {split['images']} images, its shards have {rows}"


def find_datasets(path: Path) -> list[Path]:
    """The prepared datasets at ``path``: itself, or those of a run's directory. Raises DataError if there are none."""
    if (path / DATASET_JSON).is_file():
        return [path]
    found = sorted(one.parent for one in path.glob("stages/prepare/*/dataset.json"))
    if not found:
        raise DataError(
            "no prepared dataset here",
            place=str(path),
            remedy="name a run's directory, or a dataset's",
        )
    return found


def describe(path: Path) -> str:
    """What dataset.json says, in one line."""
    description = json.loads((path / DATASET_JSON).read_text())
    counts = ", ".join(f"{split['images']} {name}" for name, split in description["splits"].items())
    return f"{path}: {counts} images of {description['classes']} classes"
