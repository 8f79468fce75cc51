"""Batches are a function of (seed, epoch, position): not of threads, ranks, micro batches or interruptions."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.schema import AugmentConfig
from pipeline.data.dataset import PreparedDataset, Split, open_dataset
from pipeline.data.loader import Batch, EvalLoader, TrainLoader
from pipeline.data.order import BalancedOrder, GlobalOrder, Order, RepeatedOrder, WindowedOrder
from pipeline.data.prefetch import AHEAD, LENT, PrefetchQueue, batches_ahead
from pipeline.data.shard_cache import ShardCache
from pipeline.errors import ConfigError, DataError
from tests.data.small_datasets import damage, make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_dataset(
        tmp_path_factory.mktemp("set"), {"train": 101, "validation": 53}, shard_rows=40
    )


def unequal(split: Split) -> BalancedOrder:
    """Balanced as if one class had most of the images."""
    return BalancedOrder(np.minimum(split.labels, np.arange(len(split)) // 30), 3, 0.8)


ORDERS: dict[str, Callable[[Split], Order]] = {
    "global": lambda split: GlobalOrder(len(split), 3),
    "windowed": lambda split: WindowedOrder([40, 40, 21], 3, 2),
    "balanced": unequal,
    "repeated": lambda split: RepeatedOrder(GlobalOrder(len(split), 3), 3, 24),
    "windowed, repeated": lambda split: RepeatedOrder(WindowedOrder([40, 40, 21], 3, 2), 2, 24),
    "balanced, repeated": lambda split: RepeatedOrder(unequal(split), 4, 24),
}
every_order = pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))


def loader(split: Split, **changes: Any) -> TrainLoader:
    settings: dict[str, Any] = {
        "seed": 3,
        "image_size": 32,
        "augment": AugmentConfig(),
        "global_batch": 24,
        "micro_batch": 24,
    }
    settings |= {"threads": 2}
    return TrainLoader(split, **(settings | changes))


def take(source: TrainLoader, batches: int) -> list[Batch]:
    with source:
        return [replace(batch, images=batch.images.clone()) for batch in islice(source, batches)]


def by_step(batches: list[Batch]) -> dict[int, dict[int, tuple[int, int, bytes]]]:
    """step -> position -> (sample, label, pixels)"""
    steps: dict[int, dict[int, tuple[int, int, bytes]]] = {}
    for b in batches:
        for image, label, sample, position in zip(
            b.images, b.labels, b.samples, b.positions, strict=True
        ):
            steps.setdefault(b.step, {})[int(position)] = (
                int(sample),
                int(label),
                image.numpy().tobytes(),
            )
    return steps


@every_order
def test_the_number_of_threads_changes_nothing(
    dataset: PreparedDataset, order: Callable[[Split], Order]
) -> None:
    split = dataset.split("train")
    runs = [
        by_step(take(loader(split, order=order(split), threads=threads), 9))
        for threads in (1, 2, 8)
    ]
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
        batches = take(
            loader(split, world_size=world_size, rank=rank, micro_batch=micro_batch), 6 * per_step
        )
        for b in batches:
            assert (b.positions[::2] % 2 == 0).all() and torch.equal(
                b.positions[::2] + 1, b.positions[1::2]
            )
        for step, images in by_step(batches).items():
            merged.setdefault(step, {}).update(images)
    assert merged == expected


@every_order
def test_a_resumed_run_sees_the_same_images_on_other_ranks_too(
    dataset: PreparedDataset, order: Callable[[Split], Order]
) -> None:
    split = dataset.split("train")
    whole = by_step(take(loader(split, order=order(split)), 11))
    resumed = by_step(take(loader(split, order=order(split), start_step=5), 6))
    assert resumed == {step: whole[step] for step in range(5, 11)}
    ranks: dict[int, dict[int, tuple[int, int, bytes]]] = {}
    for rank in range(2):
        changes = {
            "order": order(split),
            "start_step": 7,
            "world_size": 2,
            "rank": rank,
            "micro_batch": 6,
        }
        for step, images in by_step(take(loader(split, **changes), 8)).items():
            ranks.setdefault(step, {}).update(images)
    assert ranks == {step: whole[step] for step in range(7, 11)}


@given(
    st.sampled_from(list(ORDERS)),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.integers(1, 4),
    st.integers(0, 40),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_plans_of_any_world_from_any_step_are_the_order_cut(
    dataset: PreparedDataset,
    name: str,
    world_size: int,
    parts: int,
    start: int,
    data: st.DataObject,
) -> None:
    split = dataset.split("train")
    order, share = ORDERS[name](split), 24 // world_size
    micro = data.draw(st.sampled_from([size for size in range(1, share + 1) if share % size == 0]))
    seen: dict[int, list[int]] = {}
    for rank in range(world_size):
        changes = {
            "order": order,
            "world_size": world_size,
            "rank": rank,
            "micro_batch": micro,
            "start_step": start,
        }
        with loader(split, threads=1, image_size=8, **changes) as source:
            for plan in islice(source._plans(start), parts * share // micro):
                assert np.array_equal(plan.samples, plan.views % len(split))
                seen.setdefault(plan.step, []).extend(plan.views.tolist())
    assert sorted(seen) == list(range(start, start + parts))
    for step, views in seen.items():
        epoch, batch = divmod(step, order.length // 24)
        assert views == order.indices(epoch, 24 * batch, 24 * (batch + 1)).tolist()


def test_repeats_show_a_sample_augmented_differently(dataset: PreparedDataset) -> None:
    split = dataset.split("train")
    order = RepeatedOrder(GlobalOrder(len(split), 3), 3, 24)
    source = loader(split, order=order)
    assert source.steps_per_epoch == 3 * 101 // 24
    batch = take(source, 1)[0]
    shown: dict[int, set[bytes]] = {}
    for sample, image in zip(batch.samples.tolist(), batch.images, strict=True):
        shown.setdefault(sample, set()).add(image.numpy().tobytes())
    assert len(shown) == 8 and all(len(pixels) == 3 for pixels in shown.values())
    once = take(loader(split, global_batch=8, micro_batch=8), 1)[0]
    assert torch.equal(
        batch.images[:8], once.images
    )  # the first views are those of an order without repeats


def test_an_epoch_shows_every_image_at_most_once_and_drops_the_rest(
    dataset: PreparedDataset,
) -> None:
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
        assert (
            b.images.dtype == torch.uint8
            and b.images.shape == (25, 32, 32, 3)
            and b.images.float().std() > 10
        )


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch", [8, 53, 64])
def test_evaluation_sees_every_image_exactly_once(
    dataset: PreparedDataset, world_size: int, batch: int
) -> None:
    split, seen, numbers = dataset.split("validation"), [], []
    for rank in range(world_size):
        with EvalLoader(
            split,
            image_size=32,
            resize=1.0,
            batch=batch,
            rank=rank,
            world_size=world_size,
            threads=2,
        ) as source:
            batches = list(source)
            assert (
                len(batches) == source.num_batches <= source.max_batches <= source.num_batches + 1
            )
            numbers.append(source.max_batches)
            seen += [int(i) for b in batches for i in b.samples]
            assert all(len(b.images) == len(b.labels) == len(b.samples) for b in batches)
    assert sorted(seen) == list(range(53)) and len(set(numbers)) == 1


def test_evaluation_can_be_repeated_and_broken_off(dataset: PreparedDataset) -> None:
    with EvalLoader(
        dataset.split("validation"), image_size=32, resize=1.1, batch=10, threads=2
    ) as source:
        first = [b.images.sum(dtype=torch.int64) for b in source]
        for _ in islice(source, 2):
            pass
        assert [b.images.sum(dtype=torch.int64) for b in source] == first and len(first) == 6


def test_a_batch_stays_while_the_next_one_is_used(dataset: PreparedDataset) -> None:
    with loader(dataset.split("train"), prefetch_bytes=1) as source:
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
        pytest.raises(
            DataError,
            match=r"train-00001.parquet, row 5: the image is not what was written\n  -> .*prepare stage",
        ),
    ):
        list(source)


BAD = [3, 25, 26, 27, 39]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Split:
    split = make_dataset(tmp_path_factory.mktemp("damaged"), {"train": 60}, shard_rows=20).split(
        "train"
    )
    damage(split, BAD)
    return split


def test_training_stops_at_a_damaged_image_by_default(damaged: Split) -> None:
    with pytest.raises(
        DataError,
        match=r"train-0000[01].parquet, row \d+: the image is not what was written\n  -> .*prepare",
    ):
        take(loader(damaged, global_batch=12, micro_batch=12), 10)


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_damaged_image_is_replaced_the_same_way_everywhere(damaged: Split, repeats: int) -> None:
    order = RepeatedOrder(WindowedOrder([20, 20, 20], 3, 2), repeats, 12)
    settings = {"global_batch": 12, "micro_batch": 12, "order": order, "on_bad_sample": "replace"}
    steps = 5 * repeats
    runs = []
    for threads in (1, 2, 8):
        source = loader(damaged, threads=threads, **settings)
        batches = take(source, steps)
        runs.append(by_step(batches))
        assert source.replaced_samples == repeats * len(BAD)
        assert (
            any(
                f"row {BAD[0]}: the image is not what was written" in text
                for text in source.new_reasons()
            )
            or repeats > 1
        )
        assert source.new_reasons() == []
    assert runs[0] == runs[1] == runs[2]
    for b in batches:
        views = b.views % len(damaged)
        changed = torch.isin(views, torch.tensor(BAD))
        assert torch.equal(b.samples[~changed], views[~changed])
        assert set(b.samples[changed].tolist()) <= set(
            b.samples[~changed].tolist()
        )  # from the same global batch
        assert b.labels.tolist() == [damaged.label(int(sample)) for sample in b.samples]
    resumed = by_step(take(loader(damaged, start_step=2, **settings), steps - 2))
    assert resumed == {step: runs[0][step] for step in range(2, steps)}
    ranks: dict[int, dict[int, tuple[int, int, bytes]]] = {}
    count = 0
    for rank in range(2):
        source = loader(damaged, world_size=2, rank=rank, **(settings | {"micro_batch": 6}))
        for step, images in by_step(take(source, steps)).items():
            ranks.setdefault(step, {}).update(images)
        count += source.replaced_samples
    assert ranks == runs[0] and count == repeats * len(BAD)


def test_where_a_whole_batch_is_damaged_others_stand_in_and_where_all_is_lost_it_stops(
    tmp_path: Path,
) -> None:
    split = make_dataset(tmp_path, {"train": 60}, shard_rows=20).split("train")
    damage(split, list(range(40)))
    settings = {
        "global_batch": 10,
        "micro_batch": 10,
        "on_bad_sample": "replace",
        "order": WindowedOrder([20] * 3, 3, 1),
    }
    source = loader(split, **settings)
    samples = torch.cat([batch.samples for batch in take(source, 6)])
    assert source.replaced_samples == 40 and samples.min() >= 40
    damage(split, list(range(60)))
    with pytest.raises(
        DataError, match=r"row \d+: the image is not what was written; nor can 64 others"
    ):
        take(loader(split, **settings), 1)


def test_a_shard_that_its_split_cannot_give_is_a_bad_sample_too(dataset: PreparedDataset) -> None:
    class Lost(Split):
        def image(self, i: int) -> memoryview:
            if 40 <= i < 80:
                raise DataError(
                    "cannot be read: No such file",
                    place=self.place(i),
                    remedy="run the prepare stage again",
                )
            return super().image(i)

    split = copy.copy(dataset.split("train"))
    split.__class__ = Lost
    with pytest.raises(DataError, match=r"train-00001.parquet, row \d+: cannot be read"):
        take(loader(split), 4)
    source = loader(split, on_bad_sample="replace")
    samples = torch.cat([batch.samples for batch in take(source, 4)])
    assert not ((samples >= 40) & (samples < 80)).any()
    assert source.replaced_samples == int(
        ((GlobalOrder(101, 3).indices(0, 0, 96) // 40) == 1).sum()
    )


def test_one_flipped_bit_that_decodes_all_the_same_is_named(tmp_path: Path) -> None:
    split = make_dataset(tmp_path, {"train": 24}, shard_rows=24).split("train")
    take(loader(split, global_batch=24, micro_batch=24), 1)
    content = bytearray((tmp_path / "train-00000.parquet").read_bytes())
    offset, length = np.load(tmp_path / "train-00000.idx")[:2, 7].tolist()
    content[offset + length - 9] ^= 1
    (tmp_path / "train-00000.parquet").write_bytes(content)
    split = open_dataset(tmp_path).split("train")
    with pytest.raises(
        DataError, match=r"train-00000.parquet, row 7: the image is not what was written"
    ):
        take(loader(split, global_batch=24, micro_batch=24), 1)


@pytest.mark.parametrize("how", ["missing", "cut"])
def test_images_of_a_lost_shard_are_replaced_only_if_told_so(how: str, tmp_path: Path) -> None:
    make_dataset(tmp_path, {"train": 60}, shard_rows=20)
    shard = tmp_path / "train-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-9]) if how == "cut" else shard.unlink()
    with pytest.raises(DataError, match=r"train-00001.parquet"):
        open_dataset(tmp_path).split("train")
    split = open_dataset(tmp_path, whole=False).split("train")
    with pytest.raises(DataError, match=r"train-00001.parquet, row \d+"):
        take(loader(split, global_batch=12, micro_batch=12), 5)
    source = loader(split, global_batch=12, micro_batch=12, on_bad_sample="replace")
    samples = torch.cat([batch.samples for batch in take(source, 5)])
    assert not ((samples >= 20) & (samples < 40)).any() and source.replaced_samples == 20


def test_a_shard_that_is_cut_while_it_is_mapped_is_named_or_replaced(tmp_path: Path) -> None:
    split = make_dataset(tmp_path, {"train": 60}, shard_rows=20).split("train")
    size = (tmp_path / "train-00001.parquet").stat().st_size
    os.truncate(tmp_path / "train-00001.parquet", 100)
    with pytest.raises(
        DataError, match=rf"train-00001.parquet, row \d+: has 100 bytes instead of {size}"
    ):
        take(loader(split, global_batch=12, micro_batch=12), 5)
    source = loader(split, global_batch=12, micro_batch=12, on_bad_sample="replace")
    samples = torch.cat([batch.samples for batch in take(source, 5)])
    assert not ((samples >= 20) & (samples < 40)).any() and source.replaced_samples == 20


def test_prefetching_is_bounded_in_bytes(dataset: PreparedDataset) -> None:
    least, most = AHEAD
    for batch_bytes, given_bytes, ahead in (
        (100, 1, least),
        (100, 700, 5),
        (100, 799, 5),
        (100, 10_000, most),
    ):
        assert batches_ahead(batch_bytes, given_bytes) == ahead
    split = dataset.split("train")
    for size, given_bytes in ((64, 40 * 64 * 64 * 3 * 7), (64, 1), (16, 1 << 20)):
        ring = PrefetchQueue(split, 40, size, 1, given_bytes)
        held = sum(slot.images.numel() for slot in ring._free)
        assert held <= max(given_bytes, (least + LENT) * 40 * size * size * 3)
        ring.close()


def test_impossible_batches_are_refused(dataset: PreparedDataset) -> None:
    with pytest.raises(
        DataError, match="101 training images are fewer than one global batch of 128"
    ):
        loader(dataset.split("train"), global_batch=128, micro_batch=128)
    few = RepeatedOrder(GlobalOrder(101, 3), 2, 256)
    with pytest.raises(
        DataError, match="202 training images are fewer than one global batch of 256"
    ):
        loader(dataset.split("train"), global_batch=256, micro_batch=256, order=few)
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


def test_windows_of_a_remote_dataset_are_fetched_ahead_into_a_cache_smaller_than_it(
    tmp_path: Path,
) -> None:
    local = make_dataset(tmp_path / "set", {"train": 80}, shard_rows=10)
    fsspec.filesystem("memory").put(str(tmp_path / "set"), "/windows", recursive=True)
    shards = local.description["splits"]["train"]["shards"]
    indexes = sum(
        (tmp_path / "set" / shard["file"]).with_suffix(".idx").stat().st_size for shard in shards
    )
    room = indexes + 5 * max(
        shard["bytes"] for shard in shards
    )  # two windows and one to spare, of eight shards
    remote = open_dataset("memory://windows", cache=ShardCache(tmp_path / "cache", max_bytes=room))
    order = WindowedOrder([10] * 8, 3, 2)
    settings = {"order": order, "global_batch": 10, "micro_batch": 10}
    expected = by_step(take(loader(local.split("train"), **settings), 16))
    source = loader(remote.split("train"), **settings)
    assert by_step(take(source, 16)) == expected
    assert sum(file.stat().st_size for file in (tmp_path / "cache").iterdir()) <= room
