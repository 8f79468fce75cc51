"""Shards are ordinary Parquet, read back zero-copy, and damage is named."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.dataset import open_dataset
from pipeline.data.shards import GROUP_ROWS, Row, index_path, write_shard
from pipeline.errors import DataError
from pipeline.files import digest
from tests.data.small_datasets import jpeg, make_dataset, row

COLUMNS = ["key", "label", "width", "height", "hash", "image"]


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


Rows = dict[
    str, list[Any]
]  # key -> label, width, height, hash, and the digest of the image's bytes


def facts(
    key: str, label: int, width: int, height: int, hashed: str, image: bytes
) -> tuple[str, list[Any]]:
    return key, [label, width, height, hashed, digest(image)]


def by_pyarrow(files: list[str]) -> Rows:
    rows = pq.read_table(files).to_pylist()
    return dict(facts(*(row[name] for name in COLUMNS[:-1]), row["image"]["bytes"]) for row in rows)


def by_duckdb(files: list[str]) -> Rows:
    import duckdb

    with duckdb.connect() as connection:
        query = "SELECT key, label, width, height, hash, image.bytes FROM read_parquet(?)"
        return dict(facts(*row) for row in connection.execute(query, [files]).fetchall())


def by_datasets(files: list[str], cache: Path) -> Rows:
    import datasets

    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))
    assert loaded.features["image"] == datasets.Image()
    assert all(row["image"].size == (row["width"], row["height"]) for row in loaded), (
        "pictures, without being told"
    )
    raw = loaded.cast_column("image", datasets.Image(decode=False))
    return dict(facts(*(row[name] for name in COLUMNS[:-1]), row["image"]["bytes"]) for row in raw)


RAY = """
import json, sys
from pipeline.files import digest
from pipeline.orchestrate.ray_session import ray_session

with ray_session(cpus=1, gpus=0, started=lambda: None):
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.read_parquet(sys.argv[2:]).take_all()
found = {r["key"]: [r["label"], r["width"], r["height"], r["hash"], digest(r["image"]["bytes"])] for r in rows}
open(sys.argv[1], "w").write(json.dumps(found))
"""


def by_ray(files: list[str], out: Path) -> Rows:
    done = subprocess.run(
        [sys.executable, "-c", RAY, str(out), *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows: Rows = json.loads(out.read_text())
    return rows


@pytest.mark.slow
def test_standard_readers_read_the_same_rows(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", {"train": 270}, shard_rows=140)
    files = [str(path) for path in sorted((tmp_path / "set").glob("*.parquet"))]
    wanted = {
        one.key: [one.label, one.width, one.height, one.hash, digest(jpeg(i, 48, 40))]
        for i, one in enumerate(row(i, 4) for i in range(270))
    }
    assert by_pyarrow(files) == wanted
    assert by_duckdb(files) == wanted
    assert by_datasets(files, tmp_path / "cache") == wanted
    assert by_ray(files, tmp_path / "ray.json") == wanted


def test_a_shard_is_plain_uncompressed_parquet(tmp_path: Path) -> None:
    split = make_dataset(tmp_path, {"train": 270}).split("train")
    table = pq.read_table(tmp_path / "train-00000.parquet")
    assert table.column_names == COLUMNS
    assert [one["bytes"] for one in table["image"].to_pylist()] == [
        bytes(split.image(i)) for i in range(270)
    ]
    metadata = pq.read_metadata(tmp_path / "train-00000.parquet")
    assert metadata.metadata[b"fingerprint"] == b"test" and metadata.num_row_groups == 2
    for group in range(2):
        images = next(
            c
            for i in range(7)
            if (c := metadata.row_group(group).column(i)).path_in_schema == "image.bytes"
        )
        assert images.compression == "UNCOMPRESSED" and set(images.encodings) == {"PLAIN", "RLE"}
        assert not images.has_dictionary_page and not images.is_stats_set


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=600), last=st.integers(0, 2_000_000)
)
def test_the_index_says_where_every_image_lies(sizes: list[int], last: int) -> None:
    """Whatever the images' sizes: nothing at all, and more than one page would usually hold."""
    data = [bytes([i % 251]) * size for i, size in enumerate([*sizes, last])]
    rows = [Row(str(i), i, 1, 1, digest(one), one) for i, one in enumerate(data)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.parquet"
        write_shard(
            path,
            [rows[start : start + GROUP_ROWS] for start in range(0, len(rows), GROUP_ROWS)],
            "f",
        )
        content, index = path.read_bytes(), np.load(index_path(path))
        assert [
            content[offset : offset + length] for offset, length in index[:2].T.tolist()
        ] == data
        assert index[2].tolist() == list(range(len(data)))


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
    with pytest.raises(
        DataError,
        match=r"train-00000.parquet: has \d+ bytes instead of \d+\n  -> run the prepare stage",
    ):
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


@pytest.mark.parametrize(
    ("hard", "said"),
    [(4096, "210"), (130, "Too many open files\n  -> raise the limit of open files")],
)
def test_more_shards_than_files_may_be_open(tmp_path: Path, hard: int, said: str) -> None:
    make_dataset(tmp_path, {"train": 210}, shard_rows=2)
    code = f"""
import resource
from pathlib import Path
from pipeline.data.dataset import open_dataset
from pipeline.errors import DataError

resource.setrlimit(resource.RLIMIT_NOFILE, (120, {hard}))
try:
    print(len(open_dataset(Path({str(tmp_path)!r})).split("train")))
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said in done.stdout
