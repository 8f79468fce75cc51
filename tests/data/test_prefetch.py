"""Prefetching: bounded memory, batches that stay valid, measured waiting time, clean ends."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from pipeline.data.dataset import PreparedDataset, open_dataset
from pipeline.data.loader import EvalLoader
from pipeline.data.order import WindowedOrder
from pipeline.data.prefetch import (
    CONSUMER_BATCHES,
    MAX_PREFETCH,
    MIN_PREFETCH,
    PrefetchQueue,
    prefetch_batches,
)
from pipeline.data.shard_cache import ShardCache
from tests.data.loading import by_step, take, train_loader
from tests.data.small_datasets import make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_dataset(
        tmp_path_factory.mktemp("set"), {"train": 101, "validation": 53}, shard_rows=40
    )


@pytest.mark.parametrize(
    ("batch_bytes", "limit", "batches"),
    [(100, 1, MIN_PREFETCH), (100, 700, 5), (100, 799, 5), (100, 10_000, MAX_PREFETCH)],
)
def test_number_of_prefetched_batches_follows_from_the_limit(
    batch_bytes: int, limit: int, batches: int
) -> None:
    assert prefetch_batches(batch_bytes, limit) == batches


@pytest.mark.parametrize(
    ("image_size", "limit"), [(64, 40 * 64 * 64 * 3 * 7), (64, 1), (16, 1 << 20)]
)
def test_memory_of_prefetched_batches_is_bounded(
    dataset: PreparedDataset, image_size: int, limit: int
) -> None:
    queue = PrefetchQueue(
        dataset.split("train"), batch=40, image_size=image_size, threads=1, prefetch_bytes=limit
    )
    held = sum(slot.images.numel() for slot in queue._free)
    least = (MIN_PREFETCH + CONSUMER_BATCHES) * 40 * image_size**2 * 3
    assert held <= max(limit, least)
    queue.close()


def test_batch_stays_valid_while_the_next_one_is_used(dataset: PreparedDataset) -> None:
    with train_loader(dataset.split("train"), prefetch_bytes=1) as loader:
        iterator = iter(loader)
        before = next(iterator)
        copy = before.images.clone()
        for _ in range(6):
            after = next(iterator)
            assert torch.equal(before.images, copy)
            before = after
            copy = after.images.clone()


def test_evaluation_can_be_repeated_and_abandoned(dataset: PreparedDataset) -> None:
    with EvalLoader(
        dataset.split("validation"), image_size=32, resize=1.1, batch=10, threads=2
    ) as loader:
        first = [b.images.sum(dtype=torch.int64) for b in loader]
        for _ in islice(loader, 2):
            pass
        assert [b.images.sum(dtype=torch.int64) for b in loader] == first
        assert len(first) == 6


def test_waiting_time_is_measured(dataset: PreparedDataset) -> None:
    with train_loader(dataset.split("train"), threads=1, image_size=96) as loader:
        list(islice(loader, 10))
        assert 0 < loader.data_wait < 10


def test_close_ends_the_threads(dataset: PreparedDataset) -> None:
    before = threading.active_count()
    loader = train_loader(dataset.split("train"), threads=4)
    next(iter(loader))
    assert threading.active_count() == before + 4
    loader.close()
    assert threading.active_count() == before
    np.testing.assert_array_equal(list(loader), [])


def test_windows_of_a_remote_dataset_are_prefetched_into_a_smaller_cache(tmp_path: Path) -> None:
    local = make_dataset(tmp_path / "set", {"train": 80}, shard_rows=10)
    fsspec.filesystem("memory").put(str(tmp_path / "set"), "/windows", recursive=True)
    shards = local.description.splits["train"].shards
    indexes = sum(
        (tmp_path / "set" / shard.file).with_suffix(".idx").stat().st_size for shard in shards
    )
    # Five of the eight shards: two windows of two, and one to spare.
    limit = indexes + 5 * max(shard.bytes for shard in shards)
    remote = open_dataset("memory://windows", cache=ShardCache(tmp_path / "cache", max_bytes=limit))
    settings = {"order": WindowedOrder([10] * 8, 3, 2), "global_batch": 10, "micro_batch": 10}
    expected = by_step(take(train_loader(local.split("train"), **settings), 16))
    loader = train_loader(remote.split("train"), **settings)
    assert by_step(take(loader, 16)) == expected
    assert sum(file.stat().st_size for file in (tmp_path / "cache").iterdir()) <= limit
