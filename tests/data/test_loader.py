"""Batches are a function of (seed, epoch, position): not of threads, ranks, micro batches or interruptions."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.schema import AugmentConfig
from pipeline.data.format import PreparedDataset, Split
from pipeline.data.loader import Batch, EvalLoader, TrainLoader
from pipeline.errors import ConfigError, DataError
from tests.data.making import make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_dataset(tmp_path_factory.mktemp("set"), {"train": 101, "validation": 53}, shard_rows=40)


def loader(split: Split, **changes: Any) -> TrainLoader:
    settings: dict[str, Any] = {"seed": 3, "image_size": 32, "augment": AugmentConfig(), "global_batch": 24, "micro_batch": 24}
    settings |= {"threads": 2, "prefetch": 2}
    return TrainLoader(split, **(settings | changes))


def take(source: TrainLoader, batches: int) -> list[Batch]:
    with source:
        return [Batch(b.images.clone(), b.labels, b.samples, b.positions, b.epoch, b.step) for b in islice(source, batches)]


def by_step(batches: list[Batch]) -> dict[int, dict[int, tuple[int, int, bytes]]]:
    """step -> position -> (sample, label, pixels)"""
    steps: dict[int, dict[int, tuple[int, int, bytes]]] = {}
    for b in batches:
        for image, label, sample, position in zip(b.images, b.labels, b.samples, b.positions, strict=True):
            steps.setdefault(b.step, {})[int(position)] = (int(sample), int(label), image.numpy().tobytes())
    return steps


def test_the_number_of_threads_changes_nothing(dataset: PreparedDataset) -> None:
    runs = [by_step(take(loader(dataset.split("train"), threads=threads), 9)) for threads in (1, 2, 8)]
    assert runs[0] == runs[1] == runs[2] and len(runs[0]) == 9


@pytest.mark.parametrize("world_size,micro_batch", [(1, 12), (2, 12), (2, 6), (3, 4), (4, 2)])
def test_global_batches_do_not_depend_on_ranks_or_micro_batches(
    dataset: PreparedDataset, world_size: int, micro_batch: int
) -> None:
    split = dataset.split("train")
    expected = by_step(take(loader(split), 6))
    merged: dict[int, dict[int, tuple[int, int, bytes]]] = {}
    for rank in range(world_size):
        per_step = 24 // world_size // micro_batch
        batches = take(loader(split, world_size=world_size, rank=rank, micro_batch=micro_batch), 6 * per_step)
        for b in batches:
            assert (b.positions[::2] % 2 == 0).all() and torch.equal(b.positions[::2] + 1, b.positions[1::2])
        for step, images in by_step(batches).items():
            merged.setdefault(step, {}).update(images)
    assert merged == expected


def test_a_resumed_run_sees_the_same_images(dataset: PreparedDataset) -> None:
    split = dataset.split("train")
    whole = by_step(take(loader(split), 11))
    resumed = by_step(take(loader(split, start_step=5), 6))
    assert resumed == {step: whole[step] for step in range(5, 11)}


def test_an_epoch_shows_every_image_at_most_once_and_drops_the_rest(dataset: PreparedDataset) -> None:
    split = dataset.split("train")
    source = loader(split, global_batch=25, micro_batch=25)
    assert source.steps_per_epoch == 4
    batches = take(source, 8)
    epochs = [torch.cat([b.samples for b in batches if b.epoch == e]) for e in (0, 1)]
    for samples in epochs:
        assert len(samples) == 100 and len(samples.unique()) == 100
    assert not torch.equal(epochs[0], epochs[1])
    for b in batches:
        assert b.labels.tolist() == [split.label(int(i)) for i in b.samples]
        assert b.images.dtype == torch.uint8 and b.images.shape == (25, 32, 32, 3) and b.images.float().std() > 10


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch", [8, 53, 64])
def test_evaluation_sees_every_image_exactly_once(dataset: PreparedDataset, world_size: int, batch: int) -> None:
    split, seen, numbers = dataset.split("validation"), [], []
    for rank in range(world_size):
        with EvalLoader(split, image_size=32, resize=1.0, batch=batch, rank=rank, world_size=world_size, threads=2) as source:
            batches = list(source)
            assert len(batches) == source.num_batches <= source.max_batches <= source.num_batches + 1
            numbers.append(source.max_batches)
            seen += [int(i) for b in batches for i in b.samples]
            assert all(len(b.images) == len(b.labels) == len(b.samples) for b in batches)
    assert sorted(seen) == list(range(53)) and len(set(numbers)) == 1


def test_evaluation_can_be_repeated_and_broken_off(dataset: PreparedDataset) -> None:
    with EvalLoader(dataset.split("validation"), image_size=32, resize=1.1, batch=10, threads=2) as source:
        first = [b.images.sum(dtype=torch.int64) for b in source]
        for _ in islice(source, 2):
            pass
        assert [b.images.sum(dtype=torch.int64) for b in source] == first and len(first) == 6


def test_a_batch_stays_while_the_next_one_is_used(dataset: PreparedDataset) -> None:
    with loader(dataset.split("train"), prefetch=1) as source:
        iterator = iter(source)
        before = next(iterator)
        copy = before.images.clone()
        for _ in range(6):
            after = next(iterator)
            assert torch.equal(before.images, copy)
            before, copy = after, after.images.clone()


def test_waiting_is_measured(dataset: PreparedDataset) -> None:
    with loader(dataset.split("train"), threads=1, image_size=96) as source:
        list(islice(source, 10))
        assert 0 < source.data_wait < 10


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    split = make_dataset(tmp_path, {"train": 40}, shard_rows=20).split("train")
    offset = int(split._indexes[1][0, 5])
    path = tmp_path / "train-00001.parquet"
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\0" * 16)
    with (
        EvalLoader(split, image_size=32, resize=1.0, batch=8, threads=2) as source,
        pytest.raises(DataError, match=r"train-00001.parquet, row 5: the image cannot be decoded.*\n  -> .*prepare stage"),
    ):
        list(source)


def test_impossible_batches_are_refused(dataset: PreparedDataset) -> None:
    with pytest.raises(DataError, match="101 training images are fewer than one global batch of 128"):
        loader(dataset.split("train"), global_batch=128, micro_batch=128)
    with pytest.raises(ConfigError, match="no multiple of 3 processes x 16"):
        loader(dataset.split("train"), micro_batch=16, world_size=3)


def test_closing_ends_the_threads(dataset: PreparedDataset) -> None:
    before = threading.active_count()
    source = loader(dataset.split("train"), threads=4)
    next(iter(source))
    assert threading.active_count() == before + 4
    source.close()
    assert threading.active_count() == before
    np.testing.assert_array_equal(list(source), [])
