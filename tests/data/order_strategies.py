"""Random orders for property tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from pipeline.data.order import BalancedOrder, GlobalOrder, Order, RepeatedOrder, WindowedOrder

seeds = st.integers(0, 2**40)
epochs = st.integers(0, 1000)


@st.composite
def plain_orders(draw: st.DrawFn) -> Order:
    """A global, windowed or balanced order of at most a few thousand samples."""
    seed = draw(seeds)
    kind = draw(st.sampled_from(["global", "windowed", "balanced"]))
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
    """Any variant, including repeated ones."""
    order = draw(plain_orders())
    repeats = draw(st.integers(1, 4))
    if draw(st.booleans()):
        return RepeatedOrder(order, repeats, repeats * draw(st.integers(1, 40)))
    return order
