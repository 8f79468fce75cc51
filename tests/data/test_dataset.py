"""Prepared datasets: images are read back unchanged, and every kind of damage is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pipeline.data.dataset import open_dataset
from pipeline.data.description import DatasetDescription, UnsupportedFormat
from pipeline.data.shard_cache import ShardCache
from pipeline.data.shards import index_path
from pipeline.errors import DataError
from pipeline.files import write_json
from tests.data.small_datasets import jpeg, make_dataset


def test_images_and_labels_are_read_back(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"train": 700, "validation": 3}, classes=5)
    split = dataset.split("train")
    assert len(split) == 700
    assert len(dataset.split("validation")) == 3
    assert split.labels.tolist() == [i % 5 for i in range(700)]
    for i in (0, 255, 256, 299, 300, 699):
        assert bytes(split.image(i)) == jpeg(i, 48, 40)
        assert split.label(i) == i % 5
    assert dataset.classes == ["c0", "c1", "c2", "c3", "c4"]
    assert dataset.class_names[2] == "class 2"
    assert "train-00001.parquet, row 0" in split.place(300)
    with pytest.raises(IndexError):
        split.image(700)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_dataset(tmp_path / name, {"train": 300})
    for file in ("train-00000.parquet", "train-00000.idx", "dataset.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_description_is_read_back_as_written(tmp_path: Path) -> None:
    written = make_dataset(tmp_path, {"train": 10, "validation": 3}, shard_rows=4).description
    assert DatasetDescription.read(tmp_path) == written
    assert written.splits["train"].images_by_class == [3, 3, 2, 2]
    assert [shard.rows for shard in written.shards()] == [4, 4, 2, 3]


@pytest.mark.parametrize(
    ("splits", "reported", "selection"),
    [
        (["train", "validation"], "validation", None),
        (["train", "selection", "validation"], "validation", "selection"),
        (["train", "validation", "test"], "test", "validation"),
    ],
)
def test_the_reported_split_never_selects(
    tmp_path: Path, splits: list[str], reported: str, selection: str | None
) -> None:
    make_dataset(tmp_path, dict.fromkeys(splits, 4))
    description = DatasetDescription.read(tmp_path)
    assert description.reported_split() == reported
    assert description.selection_split() == selection


def test_truncated_or_missing_files_are_named_with_a_remedy(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"train": 30, "validation": 30})
    shard = tmp_path / "train-00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(
        DataError,
        match=r"train-00000.parquet: has \d+ bytes instead of \d+\n  -> run the job with",
    ):
        open_dataset(tmp_path).split("train")
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00000.parquet: cannot be read: No such file"):
        open_dataset(tmp_path).split("train")


def test_index_of_another_dataset_is_named(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"validation": 30})
    index = index_path(tmp_path / "validation-00000.parquet")
    turned = np.load(index)[:, ::-1]
    with index.open("wb") as file:
        np.save(file, turned)
    with pytest.raises(
        DataError, match=r"validation-00000.idx: checksum mismatch: the index does not belong"
    ):
        open_dataset(tmp_path).split("validation")


def test_directory_that_is_not_the_wanted_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared dataset here"):
        open_dataset(tmp_path)
    make_dataset(tmp_path / "set", {"train": 2})
    with pytest.raises(DataError, match=r"different dataset \(fingerprint: test, expected other\)"):
        open_dataset(tmp_path / "set", fingerprint="other")
    with pytest.raises(DataError, match="no split named 'validation'"):
        open_dataset(tmp_path / "set").split("validation")


def without(*path: str | int) -> Callable[[dict[str, Any]], object]:
    """An edit that removes the value at ``path``."""

    def edit(description: Any) -> None:
        for step in path[:-1]:
            description = description[step]
        del description[path[-1]]

    return edit


def replaced(value: object, *path: str | int) -> Callable[[dict[str, Any]], object]:
    """An edit that replaces the value at ``path``."""

    def edit(description: Any) -> None:
        for step in path[:-1]:
            description = description[step]
        description[path[-1]] = value

    return edit


SHARD = ("splits", "train", "shards", 0)


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (without("fingerprint"), "fingerprint is missing"),
        (without("splits"), "splits is missing"),
        (without("splits", "train", "images"), "splits.train.images is missing"),
        (without("splits", "train", "shards"), "splits.train.shards is not a list"),
        (without(*SHARD, "digest"), "splits.train.shards.0.digest is missing"),
        (replaced([], "splits"), "splits is not an object"),
        (replaced(None, "splits", "train"), "splits.train is missing"),
        (replaced("many", *SHARD, "rows"), "splits.train.shards.0.rows is not of type int"),
        (replaced(7, *SHARD, "index_digest"), "0.index_digest is not of type str"),
        (replaced(7, *SHARD), "splits.train.shards.0 is not an object"),
    ],
)
def test_damaged_description_is_named(
    edit: Callable[[dict[str, Any]], object], cause: str, remote: bool, tmp_path: Path
) -> None:
    make_dataset(tmp_path / "set", {"train": 2})
    description = json.loads((tmp_path / "set" / "dataset.json").read_text())
    del description["digest"]
    edit(description)
    write_json(tmp_path / "set" / "dataset.json", description)
    with pytest.raises(
        DataError, match=rf"dataset\.json: is damaged: .*{cause}\n  -> run the job with"
    ):
        opened(tmp_path, remote)


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"3"])
def test_description_that_is_not_a_json_object_is_named(
    content: bytes, remote: bool, tmp_path: Path
) -> None:
    make_dataset(tmp_path / "set", {"train": 2})
    (tmp_path / "set" / "dataset.json").write_bytes(content)
    with pytest.raises(DataError, match=r"dataset\.json: is damaged: .*\n  -> .*--stage prepare:"):
        opened(tmp_path, remote)


@pytest.mark.parametrize("content", [b"", b"{", b"3", b"[3]", b'[{"id": "c0"}]'])
def test_damaged_class_list_is_named(content: bytes, tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", {"train": 2})
    (tmp_path / "set" / "classes.json").write_bytes(content)
    with pytest.raises(DataError, match=r"classes\.json: is damaged: .*\n  -> .*--stage prepare:"):
        opened(tmp_path, remote=False)


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_wrong_number_of_rows_is_named(remote: bool, tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", {"train": 9})
    description = json.loads((tmp_path / "set" / "dataset.json").read_text())
    del description["digest"]
    for rows in (1, 8, 10, 10**6):
        description["splits"]["train"]["shards"][0]["rows"] = rows
        write_json(tmp_path / "set" / "dataset.json", description)
        with pytest.raises(DataError, match=r"train-00000\.idx: .*\n  -> "):
            opened(tmp_path, remote).split("train")


def test_other_format_asks_for_a_new_preparation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_COMMAND", "./launch.sh")
    make_dataset(tmp_path, {"train": 2})
    (tmp_path / "dataset.json").write_text('{"format": 1}')
    with pytest.raises(UnsupportedFormat):
        DatasetDescription.read(tmp_path)
    with pytest.raises(DataError, match="has format 1, this version reads 2") as raised:
        open_dataset(tmp_path)
    assert "run the job with --stage prepare --force" in raised.value.remedy


def opened(folder: Path, remote: bool) -> Any:
    """Open the dataset in ``folder``/set directly, or a copy of it behind a memory:// URL."""
    if not remote:
        return open_dataset(folder / "set")
    store = fsspec.filesystem("memory")
    for path in (folder / "set").iterdir():
        store.pipe_file(f"/{folder.name}/{path.name}", path.read_bytes())
    return open_dataset(f"memory://{folder.name}", cache=ShardCache(folder / "cache"))


@pytest.mark.parametrize(
    ("hard_limit", "output"),
    [(4096, "210"), (130, "Too many open files\n  -> raise the limit of open files")],
)
def test_limit_of_open_files_is_raised_as_far_as_allowed(
    tmp_path: Path, hard_limit: int, output: str
) -> None:
    make_dataset(tmp_path, {"train": 210}, shard_rows=2)
    code = f"""
import resource
from pathlib import Path
from pipeline.data.dataset import open_dataset
from pipeline.errors import DataError

resource.setrlimit(resource.RLIMIT_NOFILE, (120, {hard_limit}))
try:
    print(len(open_dataset(Path({str(tmp_path)!r})).split("train")))
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output in done.stdout
