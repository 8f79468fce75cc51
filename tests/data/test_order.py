"""The order of an epoch: any position can be asked of it, and every sample is there as often as its variant says."""

from __future__ import annotations

import tracemalloc
from collections import Counter

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
    WindowedOrder,
    order_of,
)
from pipeline.errors import DataError
from tests.data.small_datasets import make_dataset

MANY = 1_000_000_000
seeds = st.integers(0, 2**40)
epochs = st.integers(0, 1000)


@st.composite
def plain_orders(draw: st.DrawFn) -> Order:
    """A global, windowed or balanced order of at most some thousand samples."""
    seed, kind = draw(seeds), draw(st.sampled_from(["global", "windowed", "balanced"]))
    if kind == "global":
        return GlobalOrder(draw(st.integers(1, 3000)), seed)
    if kind == "windowed":
        rows = draw(st.lists(st.integers(0, 200), min_size=1, max_size=15).filter(any))
        return WindowedOrder(rows, seed, draw(st.integers(1, 17)))
    counts = draw(st.lists(st.integers(0, 150), min_size=1, max_size=12).filter(any))
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    return BalancedOrder(labels, seed, draw(st.floats(0, 1)))


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Any variant, repeated ones included."""
    order, repeats = draw(plain_orders()), draw(st.integers(1, 4))
    return (
        RepeatedOrder(order, repeats, repeats * draw(st.integers(1, 40)))
        if draw(st.booleans())
        else order
    )


@given(orders(), epochs, st.data())
@settings(max_examples=150, deadline=None)
def test_any_slice_and_any_position_agree_with_the_whole(
    order: Order, epoch: int, data: st.DataObject
) -> None:
    whole = order.indices(epoch, 0, order.length)
    assert (
        whole.dtype == np.int64 and len(np.unique(whole)) == len(whole) == order.length
    )  # no view is shown twice
    start = data.draw(st.integers(0, order.length))
    stop = data.draw(st.integers(start, order.length))
    assert np.array_equal(order.indices(epoch, start, stop), whole[start:stop])
    position = data.draw(st.integers(0, order.length - 1))
    order.index(epoch + 1, position)  # what was asked before does not matter
    assert order.index(epoch, position) == whole[position]


@given(st.integers(1, 3000), seeds, epochs)
@settings(max_examples=60, deadline=None)
def test_every_global_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(GlobalOrder(size, seed).indices(epoch, 0, size)), np.arange(size))


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=20).filter(any),
    st.integers(1, 25),
    seeds,
    epochs,
)
@settings(max_examples=80, deadline=None)
def test_every_windowed_epoch_is_a_permutation_window_after_window(
    rows: list[int], window: int, seed: int, epoch: int
) -> None:
    order = WindowedOrder(rows, seed, window)
    views = order.indices(epoch, 0, order.length)
    assert np.array_equal(np.sort(views), np.arange(sum(rows)))
    shards = np.repeat(np.arange(len(rows)), rows)[views]
    start, sequence = 0, order.shards(epoch)
    for first in range(0, len(rows), window):
        near = sequence[first : first + window].tolist()
        stop = start + sum(rows[shard] for shard in near)
        assert set(shards[start:stop].tolist()) == {shard for shard in near if rows[shard]}
        start = stop
    assert start == order.length


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=12),
    st.integers(1, 14),
    st.integers(1, 3),
    seeds,
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_shards_are_announced_before_they_are_needed(
    rows: list[int], window: int, repeats: int, seed: int, data: st.DataObject
) -> None:
    plain = WindowedOrder(rows, seed, window)
    order = RepeatedOrder(plain, repeats, repeats * data.draw(st.integers(1, 20)))
    of_shard = np.repeat(np.arange(len(rows)), rows)
    position = data.draw(st.integers(0, plain.length - 1))
    near, place = (
        order.shards_near(3, position * repeats),
        position * repeats // order.global_batch * order.global_batch,
    )
    assert len(set(near)) == len(near) <= 2 * window
    assert of_shard[order.index(3, place) % order.num_samples] in near[:window]
    later = [*plain.shards(3).tolist(), *plain.shards(4)[:window].tolist()]
    begin = later.index(near[0])
    assert [shard for shard in dict.fromkeys(later[begin:]) if shard in near] == near
    assert (
        set(later[begin : begin + window]) <= set(near)
        and GlobalOrder(9, seed).shards_near(0, 3) == []
    )


def test_a_window_is_mixed_and_epochs_open_other_windows() -> None:
    order = WindowedOrder([100] * 40, 1, 5)
    first, second = order.shards(0), order.shards(1)
    assert sorted(first) == sorted(second) == list(range(40)) and (first == second).sum() < 8
    shards = order.indices(0, 0, 500) // 100
    counts = np.array(
        [
            Counter(shards[i : i + 100].tolist())[shard]
            for i in range(0, 500, 100)
            for shard in first[:5]
        ]
    )
    assert (
        counts.sum() == 500 and counts.min() >= 5 and counts.max() <= 45
    )  # 20 on average, standard deviation 4


@given(plain_orders(), st.integers(1, 5), st.integers(1, 30), epochs)
@settings(max_examples=80, deadline=None)
def test_repeats_are_different_views_within_one_global_batch(
    order: Order, repeats: int, different: int, epoch: int
) -> None:
    batch = repeats * different
    repeated = RepeatedOrder(order, repeats, batch)
    assert repeated.length == repeats * order.length
    views = repeated.indices(epoch, 0, repeated.length)
    base = order.indices(epoch, 0, order.length)
    for number, start in enumerate(range(0, len(views), batch)):
        samples = Counter((views[start : start + batch] % order.num_samples).tolist())
        expected = Counter(
            (base[number * different : (number + 1) * different] % order.num_samples).tolist()
        )
        assert samples == Counter({sample: repeats * times for sample, times in expected.items()})
    assert len(np.unique(views)) == len(views)


@pytest.mark.parametrize(
    ("repeats", "batch"), [(2, 16), (2, 10), (3, 12), (3, 9), (4, 64), (5, 35)]
)
def test_mixing_pairs_and_processes_have_different_samples(repeats: int, batch: int) -> None:
    order = RepeatedOrder(GlobalOrder(500, 3), repeats, batch)
    samples = order.indices(0, 0, batch * (order.length // batch)) % 500
    if batch % 2 == 0:
        assert (samples[::2] != samples[1::2]).all()
    for share in samples.reshape(-1, batch // repeats):  # of each of `repeats` processes
        assert len(set(share.tolist())) == batch // repeats


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=20).filter(any),
    st.floats(0, 1),
    seeds,
    epochs,
)
@settings(max_examples=80, deadline=None)
def test_balanced_epochs_have_the_stated_multiplicities(
    counts: list[int], balance: float, seed: int, epoch: int
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    order = BalancedOrder(labels, seed, balance)
    assert order.length == len(labels)
    views = order.indices(epoch, 0, order.length)
    shown = np.bincount(views % len(labels), minlength=len(labels))
    weights = np.array([float(n) ** (1 - balance) if n else 0.0 for n in counts])
    shares = len(labels) * weights / weights.sum()
    for label, share in enumerate(shares):
        times = shown[labels == label]
        assert abs(times.sum() - share) < 1 + 1e-6
        if len(times):
            assert (
                times.max() - times.min() <= 1
            )  # rounds through the class, the last one not to the end
    for sample in np.nonzero(shown > 1)[0][:20]:  # its views are numbered in order of rounds
        assert sorted(views[views % len(labels) == sample] // len(labels)) == list(
            range(shown[sample])
        )


def test_balancing_is_right_on_average_and_between_its_ends() -> None:
    counts = [400, 100, 25, 4]
    labels = np.repeat(np.arange(4), counts)
    for balance, shares in ((0.0, counts), (0.5, [20, 10, 5, 2]), (1.0, [1, 1, 1, 1])):
        order = BalancedOrder(labels, 7, balance)
        seen = np.zeros(4)
        for epoch in range(200):
            seen += np.bincount(
                labels[order.indices(epoch, 0, order.length) % len(labels)], minlength=4
            )
        assert seen / seen.sum() == pytest.approx(np.array(shares) / sum(shares), abs=2e-4)


def test_a_balanced_epoch_is_mixed_and_a_large_class_shows_other_samples_every_epoch() -> None:
    labels = np.repeat([0, 1], [2000, 50])
    order = BalancedOrder(labels, 2, 1.0)
    halves = [labels[order.indices(0, start, start + 1025) % 2050].mean() for start in (0, 1025)]
    assert halves == pytest.approx([0.5, 0.5], abs=0.06)
    first, second = (order.indices(epoch, 0, 2050) % 2050 for epoch in (0, 1))
    common = len(set(first[first < 2000].tolist()) & set(second[second < 2000].tolist()))
    assert 400 < common < 650  # 1025 of 2000 each: 525 on average


@pytest.mark.parametrize(
    "make",
    [lambda seed: GlobalOrder(10_000, seed), lambda seed: WindowedOrder([2500] * 4, seed, 4)],
)
def test_epochs_and_seeds_differ_and_nothing_stays_in_place(make: object) -> None:
    assert callable(make)
    first, second, other = (
        make(seed).indices(epoch, 0, 10_000) for seed, epoch in ((1, 0), (1, 1), (2, 0))
    )
    for a, b in ((first, second), (first, other), (first, np.arange(10_000))):
        assert (a == b).sum() < 12  # a random permutation has one fixed point on average
    assert abs(np.corrcoef(first, np.arange(10_000))[0, 1]) < 0.05


def test_every_sample_comes_to_every_place_equally_often() -> None:
    counts = np.zeros((7, 7))
    for epoch in range(4000):
        counts[np.arange(7), GlobalOrder(7, 3).indices(epoch, 0, 7)] += 1
    expected = 4000 / 7
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 80  # 36 degrees of freedom: the 99.99% point is 76


def test_a_thousand_million_samples_need_no_table() -> None:
    rows = [10_000 - number % 2 * 2 for number in range(100_000)]  # unequal, 1e9 - 1e5 in all
    makers = [
        lambda: GlobalOrder(MANY, 5),
        lambda: WindowedOrder(rows, 5, 16),
        lambda: RepeatedOrder(GlobalOrder(MANY, 5), 4, 4096),
        lambda: RepeatedOrder(WindowedOrder(rows, 5, 16), 2, 4096),
    ]
    for make in makers:
        tracemalloc.start()
        order = make()
        places = range(0, order.length, order.length // 100)
        answers = [order.index(2, position) for position in places]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20 << 20  # a table would take a hundred times that
        assert len(set(answers)) == len(answers) and max(answers) < order.length
        assert answers[7] == order.indices(2, places[7], places[7] + 4096)[0]


def test_the_setting_chooses_the_order(tmp_path_factory: pytest.TempPathFactory) -> None:
    data: PreparedDataset = make_dataset(
        tmp_path_factory.mktemp("set"), {"train": 50}, shard_rows=20
    )

    def chosen(**keys: object) -> Order:
        return order_of(
            TrainConfig.model_validate({"epochs": 1, "base_lr": 1, "global_batch": 12, **keys}),
            data,
            4,
        )

    def same(a: Order, b: Order) -> bool:
        return a.length == b.length and np.array_equal(
            a.indices(3, 0, a.length), b.indices(3, 0, b.length)
        )

    windowed = WindowedOrder([20, 20, 10], 4, 2)
    assert same(chosen(), GlobalOrder(50, 4))
    assert same(chosen(order="windowed", window_shards=2), windowed)
    assert same(
        chosen(order="windowed", window_shards=2, repeated_augmentation=3),
        RepeatedOrder(windowed, 3, 12),
    )
    assert same(chosen(balance=0.5), BalancedOrder(data.split("train").labels, 4, 0.5))
    data = make_dataset(tmp_path_factory.mktemp("empty"), {"train": 0})
    for keys in ({}, {"order": "windowed"}, {"balance": 1.0}, {"repeated_augmentation": 2}):
        with pytest.raises(DataError, match="there are no training images\n  -> add images"):
            chosen(**keys)


def test_what_cannot_be_is_refused() -> None:
    for order in (
        GlobalOrder(10, 0),
        WindowedOrder([6, 4], 0, 1),
        RepeatedOrder(GlobalOrder(5, 0), 2, 4),
    ):
        with pytest.raises(IndexError):
            order.index(0, 10)
        with pytest.raises(IndexError):
            order.indices(0, 5, 11)
        assert len(order.indices(0, 10, 10)) == 0
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
