"""Windowed order: a permutation, one window of shards after the other, announced in advance."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import GlobalOrder, RepeatedOrder, WindowedOrder
from tests.data.order_strategies import epochs, seeds


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=20).filter(any),
    st.integers(1, 25),
    seeds,
    epochs,
)
@settings(max_examples=80, deadline=None)
def test_every_windowed_epoch_is_a_permutation_window_by_window(
    rows: list[int], window_shards: int, seed: int, epoch: int
) -> None:
    order = WindowedOrder(rows, seed, window_shards)
    views = order.indices(epoch, 0, order.length)
    assert np.array_equal(np.sort(views), np.arange(sum(rows)))
    shards = np.repeat(np.arange(len(rows)), rows)[views]
    schedule = order.shards(epoch)
    start = 0
    for first in range(0, len(rows), window_shards):
        window = schedule[first : first + window_shards].tolist()
        stop = start + sum(rows[shard] for shard in window)
        assert set(shards[start:stop].tolist()) == {shard for shard in window if rows[shard]}
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
    rows: list[int], window_shards: int, repeats: int, seed: int, data: st.DataObject
) -> None:
    plain = WindowedOrder(rows, seed, window_shards)
    order = RepeatedOrder(plain, repeats, repeats * data.draw(st.integers(1, 20)))
    shard_of_sample = np.repeat(np.arange(len(rows)), rows)
    position = data.draw(st.integers(0, plain.length - 1)) * repeats
    near = order.shards_near(3, position)
    batch_start = position // order.global_batch * order.global_batch
    assert len(set(near)) == len(near) <= 2 * window_shards
    assert shard_of_sample[order.index(3, batch_start) % order.num_samples] in near[:window_shards]
    # The announced shards are in the order of need, and continue into the next epoch.
    schedule = [*plain.shards(3).tolist(), *plain.shards(4)[:window_shards].tolist()]
    begin = schedule.index(near[0])
    assert [shard for shard in dict.fromkeys(schedule[begin:]) if shard in near] == near
    assert set(schedule[begin : begin + window_shards]) <= set(near)


@given(seeds)
@settings(max_examples=5, deadline=None)
def test_a_global_order_announces_no_shards(seed: int) -> None:
    assert GlobalOrder(9, seed).shards_near(0, 3) == []


def test_a_window_is_shuffled_and_epochs_have_other_windows() -> None:
    order = WindowedOrder([100] * 40, 1, 5)
    first = order.shards(0)
    second = order.shards(1)
    assert sorted(first) == sorted(second) == list(range(40))
    assert (first == second).sum() < 8
    shards = order.indices(0, 0, 500) // 100
    counts = np.array(
        [
            Counter(shards[i : i + 100].tolist())[shard]
            for i in range(0, 500, 100)
            for shard in first[:5]
        ]
    )
    assert counts.sum() == 500
    # 20 on average, standard deviation 4
    assert counts.min() >= 5
    assert counts.max() <= 45
