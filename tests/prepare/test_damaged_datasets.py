"""Shards that change after preparation are reported by file and row (fault D8)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.dataset import PreparedDataset, open_dataset
from pipeline.data.loader import EvalLoader
from pipeline.data.preprocessing import Preprocessing
from pipeline.data.shards import index_path
from pipeline.errors import DataError
from pipeline.files import file_digest, write_json
from pipeline.prepare.verify import verify_dataset
from tests.data.small_datasets import make_dataset
from tests.prepare.results import description
from tests.prepare.source_folders import serial


def complete_dataset(target: Path, counts: dict[str, int], shard_rows: int) -> PreparedDataset:
    """A small dataset whose description holds everything that preparation writes."""
    dataset = make_dataset(target, counts, shard_rows=shard_rows)
    values = {"seed": 0, "layout": "class_tars", "classes": 4} | description(target)
    for split in values["splits"].values():
        indexes = [np.load(index_path(target / shard["file"])) for shard in split["shards"]]
        labels = np.concatenate([index[2] for index in indexes])
        split["images_by_class"] = np.bincount(labels).tolist()
    write_json(target / "dataset.json", values)
    return dataset


def first_shard(values: dict[str, Any]) -> dict[str, Any]:
    shard: dict[str, Any] = values["splits"]["train"]["shards"][0]
    return shard


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def problems_of(target: Path) -> list[str]:
    return verify_dataset(target, serial, lambda *_: None)


def test_verify_names_the_file_of_any_flipped_bit(tmp_path: Path) -> None:
    complete_dataset(tmp_path, {"train": 60, "validation": 9}, shard_rows=30)
    assert problems_of(tmp_path) == []
    random = np.random.default_rng(1)
    for path in sorted(tmp_path.glob("*.[pi]*")):  # .parquet and .idx
        for offset in random.integers(0, path.stat().st_size, 5).tolist():
            flip_bit(path, offset)
            (problem,) = problems_of(tmp_path)
            assert problem.startswith(f"{path}: checksum mismatch"), (offset, problem)
            flip_bit(path, offset)


def test_verify_names_the_row_of_an_image_that_was_damaged_before_the_digest(
    tmp_path: Path,
) -> None:
    """A disk that damages what it is given: the digest of the file is right, the hash is not."""
    dataset = complete_dataset(tmp_path, {"train": 30}, shard_rows=300)
    shard = tmp_path / "train-00000.parquet"
    flip_bit(shard, int(dataset.split("train")._indexes[0][0, 17]) + 300)
    values = description(tmp_path)
    first_shard(values)["digest"] = file_digest(shard)
    write_json(tmp_path / "dataset.json", values)
    (problem,) = problems_of(tmp_path)
    assert problem == f"{shard}, row 17: checksum mismatch: the image changed after preparation"


def test_verify_reports_counts_that_differ_from_the_shards(tmp_path: Path) -> None:
    complete_dataset(tmp_path, {"train": 30}, shard_rows=300)
    values = description(tmp_path)
    values["splits"]["train"]["images"] = 31
    write_json(tmp_path / "dataset.json", values)
    assert problems_of(tmp_path) == ["train: dataset.json counts 31 images, its shards have 30"]


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_the_loader_names_a_shard_that_is_missing_or_cut(tmp_path: Path, damage: str) -> None:
    make_dataset(tmp_path, {"validation": 30}, shard_rows=10)
    shard = tmp_path / "validation-00001.parquet"
    if damage == "deleted":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    message = r"validation-00001\.parquet.*\n  -> .*--stage prepare:"
    with pytest.raises(DataError, match=message):
        split = open_dataset(tmp_path).split("validation")
        with EvalLoader(
            split, preprocessing=Preprocessing(32, "whole"), batch=8, threads=1
        ) as loader:
            list(loader)
