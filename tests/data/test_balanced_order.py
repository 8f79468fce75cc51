"""Balanced order: classes have the stated shares; samples of a class are shown equally often."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import BalancedOrder
from tests.data.order_strategies import epochs, seeds


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
            # Rounds through the class are complete, except the last one.
            assert times.max() - times.min() <= 1
    for sample in np.nonzero(shown > 1)[0][:20]:  # its views are numbered 0, 1, ... by round
        repeats = views[views % len(labels) == sample] // len(labels)
        assert sorted(repeats) == list(range(shown[sample]))


def test_class_shares_are_right_on_average() -> None:
    counts = [400, 100, 25, 4]
    labels = np.repeat(np.arange(4), counts)
    for balance, shares in ((0.0, counts), (0.5, [20, 10, 5, 2]), (1.0, [1, 1, 1, 1])):
        order = BalancedOrder(labels, 7, balance)
        shown = np.zeros(4)
        for epoch in range(200):
            samples = order.indices(epoch, 0, order.length) % len(labels)
            shown += np.bincount(labels[samples], minlength=4)
        assert shown / shown.sum() == pytest.approx(np.array(shares) / sum(shares), abs=2e-4)


def test_a_balanced_epoch_is_shuffled_and_shows_other_samples_of_a_large_class() -> None:
    labels = np.repeat([0, 1], [2000, 50])
    order = BalancedOrder(labels, 2, 1.0)
    halves = [labels[order.indices(0, start, start + 1025) % 2050].mean() for start in (0, 1025)]
    assert halves == pytest.approx([0.5, 0.5], abs=0.06)
    first, second = (order.indices(epoch, 0, 2050) % 2050 for epoch in (0, 1))
    common = len(set(first[first < 2000].tolist()) & set(second[second < 2000].tolist()))
    assert 400 < common < 650  # 1025 of 2000 each: 525 on average
