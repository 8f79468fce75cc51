"""Shards: standard Parquet that other readers read, and an index that locates every image."""

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

from pipeline.data.shards import Row, index_path, write_shard
from pipeline.files import digest
from tests.data.small_datasets import in_groups, jpeg, make_dataset, row

COLUMNS = ["key", "label", "width", "height", "hash", "image"]

# key -> label, width, height, hash, and the digest of the image's bytes
Rows = dict[str, list[Any]]


def facts(values: list[Any], image: bytes) -> tuple[str, list[Any]]:
    """An item of `Rows` from the other columns' values and the image."""
    key, *others = values
    return key, [*others, digest(image)]


def by_pyarrow(files: list[str]) -> Rows:
    rows = pq.read_table(files).to_pylist()
    return dict(facts([row[name] for name in COLUMNS[:-1]], row["image"]["bytes"]) for row in rows)


def by_duckdb(files: list[str]) -> Rows:
    import duckdb

    with duckdb.connect() as connection:
        query = "SELECT key, label, width, height, hash, image.bytes FROM read_parquet(?)"
        rows = connection.execute(query, [files]).fetchall()
    return dict(facts(list(values), image) for *values, image in rows)


def by_datasets(files: list[str], cache: Path) -> Rows:
    import datasets

    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))
    assert loaded.features["image"] == datasets.Image()
    assert all(row["image"].size == (row["width"], row["height"]) for row in loaded), (
        "images are decoded without further settings"
    )
    raw = loaded.cast_column("image", datasets.Image(decode=False))
    return dict(facts([row[name] for name in COLUMNS[:-1]], row["image"]["bytes"]) for row in raw)


RAY = """
import json, sys
from pipeline.files import digest
from pipeline.orchestrate.ray_session import ray_session

with ray_session(cpus=1, gpus=0):
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.read_parquet(sys.argv[2:]).take_all()
names = ["label", "width", "height", "hash"]
read = {r["key"]: [*(r[name] for name in names), digest(r["image"]["bytes"])] for r in rows}
open(sys.argv[1], "w").write(json.dumps(read))
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
    expected = {}
    for i in range(270):
        written = row(i, 4)
        sizes = [written.width, written.height]
        expected[written.key] = [written.label, *sizes, written.hash, digest(jpeg(i, 48, 40))]
    assert by_pyarrow(files) == expected
    assert by_duckdb(files) == expected
    assert by_datasets(files, tmp_path / "cache") == expected
    assert by_ray(files, tmp_path / "ray.json") == expected


def test_shard_is_plain_uncompressed_parquet(tmp_path: Path) -> None:
    split = make_dataset(tmp_path, {"train": 270}).split("train")
    table = pq.read_table(tmp_path / "train-00000.parquet")
    assert table.column_names == COLUMNS
    assert [image["bytes"] for image in table["image"].to_pylist()] == [
        bytes(split.image(i)) for i in range(270)
    ]
    metadata = pq.read_metadata(tmp_path / "train-00000.parquet")
    assert metadata.metadata[b"fingerprint"] == b"test"
    assert metadata.num_row_groups == 2
    for group in range(2):
        columns = [metadata.row_group(group).column(i) for i in range(7)]
        images = next(column for column in columns if column.path_in_schema == "image.bytes")
        assert images.compression == "UNCOMPRESSED"
        assert set(images.encodings) == {"PLAIN", "RLE"}
        assert not images.has_dictionary_page
        assert not images.is_stats_set


def write_rows(path: Path, images: list[bytes]) -> None:
    rows = [
        Row(key=str(i), label=i, width=1, height=1, hash=digest(image), image=image)
        for i, image in enumerate(images)
    ]
    write_shard(path, in_groups(rows), "f")


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=600), last=st.integers(0, 2_000_000)
)
def test_index_locates_images_of_any_size(sizes: list[int], last: int) -> None:
    """From empty images to images larger than a usual Parquet page (1 MiB)."""
    images = [bytes([i % 251]) * size for i, size in enumerate([*sizes, last])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.parquet"
        write_rows(path, images)
        content = path.read_bytes()
        index = np.load(index_path(path))
        assert [
            content[offset : offset + length] for offset, length in index[:2].T.tolist()
        ] == images
        assert index[2].tolist() == list(range(len(images)))


def test_page_layout_is_as_documented(tmp_path: Path) -> None:
    """The worked example in the docstring of pipeline.data.shards (there with other keys)."""
    path = tmp_path / "shard.parquet"
    write_rows(path, [b"abc", b"hello"])
    chunk = pq.read_metadata(path).row_group(0).column(5)
    start = chunk.data_page_offset
    page = path.read_bytes()[start : start + chunk.total_compressed_size]
    assert len(page) == 19 + 6 + 4 + 3 + 4 + 5
    assert page[25:] == b"\x03\0\0\0abc\x05\0\0\0hello"
    assert np.load(index_path(path))[:2].tolist() == [[start + 29, start + 36], [3, 5]]
