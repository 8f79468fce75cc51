"""A dataset behind a memory:// URL, and measurements of the cache that it is read through."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np

from pipeline.data.dataset import PreparedDataset, Split
from pipeline.data.shard_cache import CAPACITY_LOCK, ShardCache
from pipeline.data.shards import ShardInfo
from pipeline.files import digest
from tests.data.small_datasets import make_dataset

MEMORY = "memory:///cached"


def make_in_memory(folder: Path) -> PreparedDataset:
    """Six shards of 40 training images, two of validation images; in ``folder`` and at MEMORY."""
    dataset = make_dataset(folder, {"train": 240, "validation": 50}, shard_rows=40)
    store = fsspec.filesystem("memory")
    for path in dataset.path.iterdir():
        store.pipe_file(f"/cached/{path.name}", path.read_bytes())
    return dataset


def train_shards(dataset: PreparedDataset) -> list[ShardInfo]:
    return dataset.description.splits["train"].shards


def largest_shard(dataset: PreparedDataset) -> int:
    return max(shard.bytes for shard in train_shards(dataset))


def bytes_for(dataset: PreparedDataset, shards: float) -> int:
    """Size of a cache that holds this many shards and all indexes."""
    indexes = sum(path.stat().st_size for path in dataset.path.glob("*.idx"))
    return int(shards * largest_shard(dataset)) + indexes


def bytes_held(cache: ShardCache) -> int:
    with cache._locked(CAPACITY_LOCK):
        return sum(entry.stat().st_size for entry in os.scandir(cache.directory))


def cached_files(directory: Path) -> list[Path]:
    """The complete files of a cache."""
    return [
        path
        for path in directory.iterdir()
        if not path.name.startswith(".") and path.suffix != ".tmp"
    ]


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition did not become true within 10 seconds")


def assert_same_images(remote_split: Split, split: Split) -> None:
    assert len(remote_split) == len(split)
    np.testing.assert_array_equal(remote_split.labels, split.labels)
    for i in np.random.default_rng(0).permutation(len(split)).tolist():
        assert bytes(remote_split.image(i)) == bytes(split.image(i))


def digest_of_images(split: Split) -> str:
    return digest(b"".join(bytes(split.image(i)) for i in range(len(split))))
