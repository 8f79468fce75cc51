"""Shards are ordinary Parquet, read back zero-copy, and damage is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.data.format import open_dataset
from pipeline.data.shards import index_path
from pipeline.errors import DataError
from pipeline.files import digest
from tests.data.making import jpeg, make_dataset


def test_what_is_written_is_read(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"train": 700, "validation": 3}, classes=5)
    split = dataset.split("train")
    assert len(split) == 700 and len(dataset.split("validation")) == 3
    assert split.labels.tolist() == [i % 5 for i in range(700)]
    for i in (0, 255, 256, 299, 300, 699):
        assert bytes(split.image(i)) == jpeg(i, 48, 40) and split.label(i) == i % 5
    assert dataset.classes == ["c0", "c1", "c2", "c3", "c4"] and dataset.class_names[2] == "class 2"
    assert "train-00001.parquet, row 0" in split.place(300)
    with pytest.raises(IndexError):
        split.image(700)


def test_pyarrow_reads_the_same_rows(tmp_path: Path) -> None:
    split = make_dataset(tmp_path, {"train": 270}).split("train")
    table = pq.read_table(tmp_path / "train-00000.parquet")
    assert table.column_names == ["key", "label", "width", "height", "hash", "image"]
    for i, entry in enumerate(table.to_pylist()):
        assert entry["image"] == bytes(split.image(i)) and entry["hash"] == digest(entry["image"])
        assert (entry["label"], entry["width"], entry["height"]) == (split.label(i), 48, 40)
    metadata = pq.read_metadata(tmp_path / "train-00000.parquet")
    assert metadata.metadata[b"fingerprint"] == b"test" and metadata.num_row_groups == 2
    column = metadata.row_group(0).column(5)
    assert column.compression == "UNCOMPRESSED" and not column.has_dictionary_page and not column.is_stats_set


def test_hugging_face_datasets_reads_pictures(tmp_path: Path) -> None:
    import datasets

    make_dataset(tmp_path / "set", {"train": 20})
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "set" / "train-*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    loaded = loaded.cast_column("image", datasets.Image())
    assert len(loaded) == 20 and loaded[3]["image"].size == (48, 40) and loaded[3]["label"] == 3


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_dataset(tmp_path / name, {"train": 300})
    for file in ("train-00000.parquet", "train-00000.idx", "dataset.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_damage_is_named_with_a_remedy(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"train": 30, "validation": 30})
    shard = tmp_path / "train-00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=r"train-00000.parquet: has \d+ bytes instead of \d+\n  -> run the prepare stage"):
        open_dataset(tmp_path).split("train")
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00000.parquet: cannot be read: No such file"):
        open_dataset(tmp_path).split("train")
    index = index_path(tmp_path / "validation-00000.parquet")
    turned = np.load(index)[:, ::-1]
    with index.open("wb") as file:
        np.save(file, turned)
    with pytest.raises(DataError, match=r"validation-00000.idx: does not belong"):
        open_dataset(tmp_path).split("validation")


def test_a_directory_that_is_no_dataset_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared dataset here"):
        open_dataset(tmp_path)
    make_dataset(tmp_path / "set", {"train": 2})
    with pytest.raises(DataError, match="another dataset: fingerprint test, expected other"):
        open_dataset(tmp_path / "set", fingerprint="other")
    with pytest.raises(DataError, match="no split named 'validation'"):
        open_dataset(tmp_path / "set").split("validation")
    (tmp_path / "set" / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        open_dataset(tmp_path / "set")
