"""A prepared dataset behind a URL: how it is opened, and what is refused."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.data.dataset import PreparedDataset, open_dataset
from pipeline.data.shard_cache import ShardCache
from pipeline.errors import DataError
from tests.data.remote_datasets import MEMORY, cached_files, make_in_memory, train_shards


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_in_memory(tmp_path_factory.mktemp("set"))


def test_headers_of_indexes_are_parsed_one_after_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, local: PreparedDataset
) -> None:
    """NumPy parses them with `ast`, which threads of CPython 3.11 must not use at once."""
    parsing = threading.Lock()
    original = np.lib.format.read_array_header_1_0

    def read_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[np.int64]]:
        assert parsing.acquire(blocking=False), "two threads parse at once"
        try:
            time.sleep(0.01)  # time for other threads to arrive
            return original(file)
        finally:
            parsing.release()

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", read_header)
    dataset = open_dataset(MEMORY, cache=ShardCache(tmp_path / "cache"))
    assert dataset.split("train").labels.tolist() == local.split("train").labels.tolist()


def test_remote_dataset_without_cache_or_dataset_is_an_error(
    tmp_path: Path, local: PreparedDataset
) -> None:
    with pytest.raises(DataError, match="memory:///cached: is remote, and there is no cache"):
        open_dataset(MEMORY)
    with pytest.raises(DataError, match="memory:///nothing: no prepared dataset here"):
        open_dataset("memory://nothing", cache=ShardCache(tmp_path / "cache"))


def test_damaged_digest_in_the_description_never_becomes_a_file_name(
    tmp_path: Path, local: PreparedDataset
) -> None:
    store = MemoryFileSystem()
    text = (local.path / "dataset.json").read_text()
    name = "/other/dataset.json"
    values = json.loads(text.replace(train_shards(local)[0].digest, "../../x"))
    del values["digest"]
    store.pipe_file(name, json.dumps(values).encode())
    store.pipe_file("/other/classes.json", (local.path / "classes.json").read_bytes())
    dataset = open_dataset("memory:///other", cache=ShardCache(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"dataset\.json: is damaged: '../../x' is not a digest"):
        dataset.split("train")
    assert cached_files(tmp_path / "cache") == []
