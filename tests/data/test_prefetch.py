"""Prefetching: bounded memory, batches that stay valid, measured waiting time, clean ends."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path
from typing import Any

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
from pipeline.data.preprocessing import Preprocessing
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
        dataset.split("validation"), preprocessing=Preprocessing(32), batch=10, threads=2
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


class Device:
    """A simulated device with a queue of work. Time is counted, not measured."""

    def __init__(self) -> None:
        self.queued = 0  # pieces of work that the host has given to the device
        self.waits: list[tuple[str, int]] = []  # (thread, number of pieces waited for)

    def event(self) -> Event:
        return Event(self)


class Event:
    """An event behind all work that is queued when it is recorded, like torch.cuda.Event."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.behind = 0

    def record(self) -> None:
        self.behind = self.device.queued

    def synchronize(self) -> None:
        self.device.waits.append((threading.current_thread().name, self.behind))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Make torch look as if it had a GPU and page-locked memory."""
    simulated = Device()
    empty = torch.empty

    def without_pinning(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return empty(*shape, **options)

    monkeypatch.setattr(torch.cuda, "Event", simulated.event)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", without_pinning)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    return simulated


def test_only_writers_wait_and_only_for_the_copy_that_they_overwrite(
    device: Device, dataset: PreparedDataset
) -> None:
    """Each step queues a copy and then 100 pieces of work, as a forward and backward pass does."""
    copies = []
    with train_loader(dataset.split("train"), threads=1, pin_memory=True) as loader:
        slots = len(loader._queue._free) + len(loader._queue._pending)
        for batch in islice(loader, 4 * slots):
            device.queued += 1
            copies.append(device.queued)
            batch.to(torch.device("cpu"))
            device.queued += 100
    assert device.waits
    assert {thread for thread, _ in device.waits} == {"loader-0"}
    # A wait for anything but a copy would be a wait for a whole step behind it.
    waited = [behind for _, behind in device.waits]
    assert set(waited) <= set(copies)
    # In the order of the copies: the oldest one is the first to have ended.
    assert list(dict.fromkeys(waited)) == copies[: len(set(waited))]


def test_the_slot_that_was_used_longest_ago_is_filled_first(dataset: PreparedDataset) -> None:
    with train_loader(dataset.split("train")) as loader:
        before = next(iter(loader))
        next(iter(loader))
        # All slots become free at once; the copy of the newest batch may still be under way.
        again = next(loader.rewind(0))
        assert again.images.data_ptr() != before.images.data_ptr()


def test_memory_is_pinned_only_for_a_consumer_on_a_gpu(
    dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[bool] = []
    empty = torch.empty

    def recording(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        pinned.append(pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", recording)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    train_loader(dataset.split("train")).close()
    assert pinned
    assert not any(pinned)
    pinned.clear()
    train_loader(dataset.split("train"), pin_memory=True).close()
    assert all(pinned)
