"""Every order is a pure function of position and shows each sample as often as it states."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.schema import TrainConfig
from pipeline.data.dataset import PreparedDataset
from pipeline.data.order import (
    BalancedOrder,
    GlobalOrder,
    Order,
    RepeatedOrder,
    Views,
    WindowedOrder,
    order_of,
)
from pipeline.errors import DataError
from tests.data.order_strategies import epochs, orders, plain_orders, seeds
from tests.data.small_datasets import make_dataset

BILLION = 1_000_000_000


@given(orders(), epochs, st.data())
@settings(max_examples=150, deadline=None)
def test_slices_and_single_positions_agree_with_the_whole_epoch(
    order: Order, epoch: int, data: st.DataObject
) -> None:
    whole = order.indices(epoch, 0, order.length)
    assert whole.dtype == np.int64
    assert len(np.unique(whole)) == len(whole) == order.length  # no view is shown twice
    start = data.draw(st.integers(0, order.length))
    stop = data.draw(st.integers(start, order.length))
    assert np.array_equal(order.indices(epoch, start, stop), whole[start:stop])
    position = data.draw(st.integers(0, order.length - 1))
    order.index(epoch + 1, position)  # earlier calls have no influence
    assert order.index(epoch, position) == whole[position]


@given(st.integers(1, 3000), seeds, epochs)
@settings(max_examples=60, deadline=None)
def test_every_global_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(GlobalOrder(size, seed).indices(epoch, 0, size)), np.arange(size))


@pytest.mark.parametrize(
    "make",
    [lambda seed: GlobalOrder(10_000, seed), lambda seed: WindowedOrder([2500] * 4, seed, 4)],
    ids=["global", "windowed"],
)
def test_epochs_and_seeds_give_different_orders(make: Callable[[int], Order]) -> None:
    first = make(1).indices(0, 0, 10_000)
    next_epoch = make(1).indices(1, 0, 10_000)
    other_seed = make(2).indices(0, 0, 10_000)
    for a, b in ((first, next_epoch), (first, other_seed), (first, np.arange(10_000))):
        assert (a == b).sum() < 12  # a random permutation has one fixed point on average
    assert abs(np.corrcoef(first, np.arange(10_000))[0, 1]) < 0.05


def test_every_sample_is_equally_often_at_every_position() -> None:
    counts = np.zeros((7, 7))
    for epoch in range(4000):
        counts[np.arange(7), GlobalOrder(7, 3).indices(epoch, 0, 7)] += 1
    expected = 4000 / 7
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 80  # 36 degrees of freedom: the 99.99% point is 76


def test_memory_does_not_grow_with_a_billion_samples() -> None:
    rows = [10_000 - number % 2 * 2 for number in range(100_000)]  # unequal, 1e9 - 1e5 in all
    makers = [
        lambda: GlobalOrder(BILLION, 5),
        lambda: WindowedOrder(rows, 5, 16),
        lambda: RepeatedOrder(GlobalOrder(BILLION, 5), 4, 4096),
        lambda: RepeatedOrder(WindowedOrder(rows, 5, 16), 2, 4096),
    ]
    for make in makers:
        tracemalloc.start()
        order = make()
        positions = range(0, order.length, order.length // 100)
        views = [order.index(2, position) for position in positions]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20 << 20  # a table would need a hundred times as much
        assert len(set(views)) == len(views)
        assert max(views) < order.length
        assert views[7] == order.indices(2, positions[7], positions[7] + 4096)[0]


class InFileOrder(Order):
    """Position = sample: an inner order whose repeats are easy to read."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.length = num_samples

    def _views(self, epoch: int, start: int, stop: int) -> Views:
        return np.arange(start, stop, dtype=np.int64)


def test_repeated_order_follows_its_worked_example() -> None:
    order = RepeatedOrder(InFileOrder(10), repeats=3, global_batch=12)
    views = order.indices(0, 0, 30)
    assert (views[:12] % 10).tolist() == [0, 1, 2, 3] * 3
    assert (views[:12] // 10).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (views[24:] % 10).tolist() == [8, 9] * 3
    assert (views[24:] // 10).tolist() == [0, 0, 1, 1, 2, 2]


@given(plain_orders(), st.integers(1, 5), st.integers(1, 30), epochs)
@settings(max_examples=80, deadline=None)
def test_repeats_are_different_views_within_one_global_batch(
    order: Order, repeats: int, different: int, epoch: int
) -> None:
    batch = repeats * different
    repeated = RepeatedOrder(order, repeats, batch)
    assert repeated.length == repeats * order.length
    views = repeated.indices(epoch, 0, repeated.length)
    inner = order.indices(epoch, 0, order.length)
    for number, start in enumerate(range(0, len(views), batch)):
        samples = Counter((views[start : start + batch] % order.num_samples).tolist())
        expected = Counter(
            (inner[number * different : (number + 1) * different] % order.num_samples).tolist()
        )
        assert samples == Counter({sample: repeats * times for sample, times in expected.items()})
    assert len(np.unique(views)) == len(views)


@pytest.mark.parametrize(
    ("repeats", "batch"), [(2, 16), (2, 10), (3, 12), (3, 9), (4, 64), (5, 35)]
)
def test_mixup_pairs_and_ranks_have_different_samples(repeats: int, batch: int) -> None:
    order = RepeatedOrder(GlobalOrder(500, 3), repeats, batch)
    samples = order.indices(0, 0, batch * (order.length // batch)) % 500
    if batch % 2 == 0:
        assert (samples[::2] != samples[1::2]).all()
    for share in samples.reshape(-1, batch // repeats):  # of each of `repeats` ranks
        assert len(set(share.tolist())) == batch // repeats


def test_the_train_config_selects_the_order(tmp_path_factory: pytest.TempPathFactory) -> None:
    data: PreparedDataset = make_dataset(
        tmp_path_factory.mktemp("set"), {"train": 50}, shard_rows=20
    )

    def selected(**keys: object) -> Order:
        config = {"epochs": 1, "base_lr": 1, "global_batch": 12, **keys}
        return order_of(TrainConfig.model_validate(config), data, 4)

    def same(a: Order, b: Order) -> bool:
        return a.length == b.length and np.array_equal(
            a.indices(3, 0, a.length), b.indices(3, 0, b.length)
        )

    windowed = WindowedOrder([20, 20, 10], 4, 2)
    assert same(selected(), GlobalOrder(50, 4))
    assert same(selected(order="windowed", window_shards=2), windowed)
    assert same(
        selected(order="windowed", window_shards=2, repeated_augmentation=3),
        RepeatedOrder(windowed, 3, 12),
    )
    assert same(selected(balance=0.5), BalancedOrder(data.split("train").labels, 4, 0.5))
    data = make_dataset(tmp_path_factory.mktemp("empty"), {"train": 0})
    for keys in ({}, {"order": "windowed"}, {"balance": 1.0}, {"repeated_augmentation": 2}):
        with pytest.raises(DataError, match="there are no training images\n  -> add images"):
            selected(**keys)


@pytest.mark.parametrize(
    "order",
    [
        GlobalOrder(10, 0),
        WindowedOrder([6, 4], 0, 1),
        RepeatedOrder(GlobalOrder(5, 0), 2, 4),
    ],
    ids=lambda order: type(order).__name__,
)
def test_positions_outside_the_epoch_raise_index_error(order: Order) -> None:
    with pytest.raises(IndexError, match="outside"):
        order.index(0, 10)
    with pytest.raises(IndexError, match="outside"):
        order.indices(0, 5, 11)
    assert len(order.indices(0, 10, 10)) == 0


def test_impossible_arguments_raise_value_error() -> None:
    for make in (
        lambda: GlobalOrder(0, 0),
        lambda: WindowedOrder([], 0, 1),
        lambda: WindowedOrder([0, 0], 0, 1),
        lambda: WindowedOrder([3], 0, 0),
        lambda: BalancedOrder(np.zeros(0, dtype=np.int64), 0, 1.0),
        lambda: BalancedOrder(np.zeros(3, dtype=np.int64), 0, 1.5),
        lambda: RepeatedOrder(GlobalOrder(10, 0), 3, 10),
    ):
        with pytest.raises(ValueError):
            make()
