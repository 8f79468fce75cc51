"""Verify a prepared dataset: every digest, the hash and decoding of every image, all counts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline.data.dataset import open_dataset
from pipeline.data.decode import JPEG_MAGIC, decode_any, decode_jpeg
from pipeline.data.description import DatasetDescription
from pipeline.data.local_shards import PREPARE_AGAIN
from pipeline.data.shards import ShardInfo, index_path
from pipeline.errors import DataError
from pipeline.files import digest, file_digest
from pipeline.layout import DATASET_JSON, RunDir
from pipeline.prepare.map_tasks import MapTasks
from pipeline.reporting import Progress


def verify_dataset(path: Path, tasks: MapTasks, progress: Progress) -> list[str]:
    """All problems of the dataset in ``path``, one sentence each, naming file and row.

    Raises:
        DataError: there is no dataset, or its description cannot be read.
    """
    open_dataset(path)  # raises if it cannot be opened at all
    description = _description(path)
    shards = list(description.shards())
    problems: list[str] = []
    for done, (_, shard_problems) in enumerate(tasks(partial(verify_shard, path), shards), 1):
        problems += shard_problems
        progress(f"{path.name}: verifying", done, len(shards), f"{len(problems)} problems")
    return sorted(problems) + list(_wrong_counts(description))


def verify_shard(path: Path, shard: ShardInfo) -> list[str]:
    """All problems of one shard of the dataset in ``path``."""
    # 1. Digests of both files. If one is wrong, its rows are not worth listing.
    shard_path = path / shard.file
    index = index_path(shard_path)
    for file, expected in ((shard_path, shard.digest), (index, shard.index_digest)):
        if not file.is_file():
            return [f"{file}: missing"]
        if file_digest(file) != expected:
            return [f"{file}: checksum mismatch: the file changed after preparation"]

    # 2. Each image. The digests can be right and an image still wrong, if it was damaged before
    # they were computed.
    problems: list[str] = []
    content = np.memmap(shard_path, dtype=np.uint8, mode="r")
    hashes = pq.read_table(shard_path, columns=["hash"])["hash"].to_pylist()
    offsets_and_lengths = np.load(index, allow_pickle=False)[:2].T.tolist()
    for row, (offset, length) in enumerate(offsets_and_lengths):
        problem = _image_problem(content[offset : offset + length].tobytes(), hashes[row])
        if problem is not None:
            problems.append(f"{shard_path}, row {row}: {problem}")
    return problems


def _image_problem(data: bytes, expected_hash: str) -> str | None:
    if digest(data) != expected_hash:
        return "checksum mismatch: the image changed after preparation"
    try:
        # The same two decoders that the loader uses.
        if data.startswith(JPEG_MAGIC):
            decode_jpeg(data)
        else:
            decode_any(data)
    except ValueError as error:
        return str(error)
    return None


def _wrong_counts(description: DatasetDescription) -> Iterator[str]:
    for name, split in description.splits.items():
        rows = sum(shard.rows for shard in split.shards)
        if rows != split.images or sum(split.images_by_class) != rows:
            yield f"{name}: dataset.json counts {split.images} images, its shards have {rows}"


def find_datasets(path: Path) -> list[Path]:
    """The prepared datasets at ``path``: itself, or those of a run directory.

    Raises:
        DataError: there are none.
    """
    if (path / DATASET_JSON).is_file():
        return [path]
    datasets = prepared_datasets(RunDir(path))
    if not datasets:
        raise DataError(
            "no prepared dataset here",
            place=str(path),
            remedy="give a run directory, or the directory of a dataset",
        )
    return datasets


def prepared_datasets(run_dir: RunDir) -> list[Path]:
    """The prepared datasets of a run, in the order of their names."""
    return sorted(file.parent for file in run_dir.stage("prepare").glob(f"*/{DATASET_JSON}"))


def describe(path: Path) -> str:
    """A dataset in one line: "runs/a/.../x: 60 train, 18 validation images of 3 classes"."""
    description = _description(path)
    counts = ", ".join(f"{split.images} {name}" for name, split in description.splits.items())
    return f"{path}: {counts} images of {description.classes} classes"


def _description(path: Path) -> DatasetDescription:
    try:
        return DatasetDescription.read(path)
    except ValueError as error:
        raise DataError(
            str(error),
            place=str(path / DATASET_JSON),
            remedy=PREPARE_AGAIN,
        ) from None
