"""The order of an epoch is a permutation that any position can be asked of."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import Order

sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**40)
epochs = st.integers(0, 1000)


@given(sizes, seeds, epochs)
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = Order(size, seed).indices(epoch, 0, size)
    assert np.array_equal(np.sort(order), np.arange(size))


@given(sizes, seeds, epochs, st.data())
@settings(max_examples=60, deadline=None)
def test_any_slice_and_any_position_agree_with_the_whole(size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    order = Order(size, seed)
    whole = order.indices(epoch, 0, size)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    assert np.array_equal(order.indices(epoch, start, stop), whole[start:stop])
    position = data.draw(st.integers(0, size - 1))
    assert order.index(epoch, position) == whole[position]


def test_epochs_and_seeds_differ_and_nothing_stays_in_place() -> None:
    first, second = Order(10_000, 1).indices(0, 0, 10_000), Order(10_000, 1).indices(1, 0, 10_000)
    other = Order(10_000, 2).indices(0, 0, 10_000)
    for a, b in ((first, second), (first, other), (first, np.arange(10_000))):
        assert (a == b).sum() < 12  # a random permutation has one fixed point on average
    assert abs(np.corrcoef(first, np.arange(10_000))[0, 1]) < 0.05


def test_every_sample_comes_to_every_place_equally_often() -> None:
    counts = np.zeros((7, 7))
    for epoch in range(4000):
        counts[np.arange(7), Order(7, 3).indices(epoch, 0, 7)] += 1
    expected = 4000 / 7
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 80  # 36 degrees of freedom: the 99.99% point is 76


def test_a_thousand_million_samples_need_no_table() -> None:
    order = Order(1_000_000_000, 5)
    began = time.perf_counter()
    answers = [order.index(2, position) for position in range(0, 1_000_000_000, 10_000_000)]
    assert (time.perf_counter() - began) / len(answers) < 1e-3
    assert len(set(answers)) == len(answers)
    assert answers[7] == order.indices(2, 70_000_000, 70_000_001)[0]


def test_positions_outside_are_refused() -> None:
    with pytest.raises(IndexError):
        Order(10, 0).index(0, 10)
    with pytest.raises(IndexError):
        Order(10, 0).indices(0, 5, 11)
    with pytest.raises(ValueError):
        Order(0, 0)
