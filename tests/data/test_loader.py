"""Batches depend on seed, epoch and position; not on threads, ranks, micro-batches or resumes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.dataset import PreparedDataset, Split
from pipeline.data.loader import EvalLoader
from pipeline.data.order import BalancedOrder, GlobalOrder, Order, RepeatedOrder, WindowedOrder
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import ConfigError, DataError
from tests.data.loading import by_step, merged, take, train_loader
from tests.data.small_datasets import make_dataset


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


@every_order
def test_number_of_threads_changes_nothing(
    dataset: PreparedDataset, order: Callable[[Split], Order]
) -> None:
    split = dataset.split("train")
    runs = [
        by_step(take(train_loader(split, order=order(split), threads=threads), 9))
        for threads in (1, 2, 8)
    ]
    assert runs[0] == runs[1]
    assert runs[1] == runs[2]
    assert len(runs[0]) == 9


@pytest.mark.parametrize("world_size,micro_batch", [(1, 12), (2, 12), (2, 6), (3, 4), (4, 2)])
def test_global_batches_do_not_depend_on_ranks_or_micro_batches(
    dataset: PreparedDataset, world_size: int, micro_batch: int
) -> None:
    split = dataset.split("train")
    expected = by_step(take(train_loader(split), 6))
    ranks = []
    for rank in range(world_size):
        per_step = 24 // world_size // micro_batch
        loader = train_loader(split, world_size=world_size, rank=rank, micro_batch=micro_batch)
        batches = take(loader, 6 * per_step)
        for b in batches:
            # Mixup pairs neighbours: even positions stay together with the next odd one.
            assert (b.positions[::2] % 2 == 0).all()
            assert torch.equal(b.positions[::2] + 1, b.positions[1::2])
        ranks.append(by_step(batches))
    assert merged(ranks) == expected


@every_order
def test_resumed_run_sees_the_same_images_on_any_number_of_ranks(
    dataset: PreparedDataset, order: Callable[[Split], Order]
) -> None:
    split = dataset.split("train")
    uninterrupted = by_step(take(train_loader(split, order=order(split)), 11))
    resumed = by_step(take(train_loader(split, order=order(split), start_step=5), 6))
    assert resumed == {step: uninterrupted[step] for step in range(5, 11)}
    ranks = []
    for rank in range(2):
        loader = train_loader(
            split, order=order(split), start_step=7, world_size=2, rank=rank, micro_batch=6
        )
        ranks.append(by_step(take(loader, 8)))
    assert merged(ranks) == {step: uninterrupted[step] for step in range(7, 11)}


@given(
    st.sampled_from(list(ORDERS)),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.integers(1, 4),
    st.integers(0, 40),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_plans_of_all_ranks_cover_the_order_from_any_step(
    dataset: PreparedDataset,
    name: str,
    world_size: int,
    steps: int,
    start: int,
    data: st.DataObject,
) -> None:
    split = dataset.split("train")
    order = ORDERS[name](split)
    share = 24 // world_size
    micro = data.draw(st.sampled_from([size for size in range(1, share + 1) if share % size == 0]))
    seen: dict[int, list[int]] = {}
    for rank in range(world_size):
        loader = train_loader(
            split,
            threads=1,
            image_size=8,
            order=order,
            world_size=world_size,
            rank=rank,
            micro_batch=micro,
            start_step=start,
        )
        with loader:
            for plan in islice(loader._plans(start), steps * share // micro):
                assert np.array_equal(plan.samples, plan.views % len(split))
                seen.setdefault(plan.step, []).extend(plan.views.tolist())
    assert sorted(seen) == list(range(start, start + steps))
    for step, views in seen.items():
        epoch, batch = divmod(step, order.length // 24)
        assert views == order.indices(epoch, 24 * batch, 24 * (batch + 1)).tolist()


def test_repeats_of_a_sample_are_augmented_differently(dataset: PreparedDataset) -> None:
    split = dataset.split("train")
    order = RepeatedOrder(GlobalOrder(len(split), 3), 3, 24)
    loader = train_loader(split, order=order)
    assert loader.steps_per_epoch == 3 * 101 // 24
    batch = take(loader, 1)[0]
    shown: dict[int, set[bytes]] = {}
    for sample, image in zip(batch.samples.tolist(), batch.images, strict=True):
        shown.setdefault(sample, set()).add(image.numpy().tobytes())
    assert len(shown) == 8
    assert all(len(pixels) == 3 for pixels in shown.values())
    # The first repeats are the views of an order without repeats.
    once = take(train_loader(split, global_batch=8, micro_batch=8), 1)[0]
    assert torch.equal(batch.images[:8], once.images)


def test_epoch_shows_every_image_at_most_once_and_drops_the_rest(dataset: PreparedDataset) -> None:
    split = dataset.split("train")
    loader = train_loader(split, global_batch=25, micro_batch=25)
    assert loader.steps_per_epoch == 4
    batches = take(loader, 8)
    epochs = [torch.cat([b.samples for b in batches if b.epoch == e]) for e in (0, 1)]
    for samples in epochs:
        assert len(samples) == 100
        assert len(samples.unique()) == 100
    assert not torch.equal(epochs[0], epochs[1])
    for b in batches:
        assert b.labels.tolist() == [split.label(int(i)) for i in b.samples]
        assert b.images.dtype == torch.uint8
        assert b.images.shape == (25, 32, 32, 3)
        assert b.images.float().std() > 10


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch", [8, 53, 64])
def test_evaluation_sees_every_image_exactly_once(
    dataset: PreparedDataset, world_size: int, batch: int
) -> None:
    split = dataset.split("validation")
    seen = []
    max_batches = []
    for rank in range(world_size):
        with EvalLoader(
            split,
            preprocessing=Preprocessing(32, "whole"),
            batch=batch,
            rank=rank,
            world_size=world_size,
            threads=2,
        ) as loader:
            batches = list(loader)
            assert len(batches) == loader.num_batches
            assert loader.num_batches <= loader.max_batches <= loader.num_batches + 1
            max_batches.append(loader.max_batches)
            seen += [int(i) for b in batches for i in b.samples]
            assert all(len(b.images) == len(b.labels) == len(b.samples) for b in batches)
    assert sorted(seen) == list(range(53))
    assert len(set(max_batches)) == 1


def test_impossible_batches_are_refused(dataset: PreparedDataset) -> None:
    split = dataset.split("train")
    with pytest.raises(
        DataError, match="101 training images are fewer than one global batch of 128"
    ):
        train_loader(split, global_batch=128, micro_batch=128)
    few = RepeatedOrder(GlobalOrder(101, 3), 2, 256)
    with pytest.raises(
        DataError, match="202 training images are fewer than one global batch of 256"
    ):
        train_loader(split, global_batch=256, micro_batch=256, order=few)
    with pytest.raises(ConfigError, match="no multiple of 3 processes x 16"):
        train_loader(split, micro_batch=16, world_size=3)
