"""Exponential moving average (EMA) of the weights, sharded like the fp32 weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from pipeline.train.zero_state import ShardedState


@torch.no_grad()
def ema_update(state: ShardedState, decay: float, step: int) -> None:
    """Update the EMA after optimizer step ``step`` (0-based).

    ema += (1 - decay) * (weights - ema). No communication: each rank averages its own shard. Does
    nothing if the state keeps no EMA.

    The first steps use a lower decay, (1 + step) / (10 + step), so that short runs do not average
    the initial weights. Example for decay 0.9999: 0.1 at step 0, 0.55 at step 10, 0.92 at step 100.
    """
    if state.ema is None:
        return
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(state.ema, [flat.detach() for flat in state.flats], 1 - decay)


@contextlib.contextmanager
def ema_weights(state: ShardedState) -> Iterator[None]:
    """Make the network compute with the EMA inside the block; no effect without one. Collective."""
    if state.ema is None:
        yield
        return
    backup = state.backup_weights()
    state.copy_to_model(state.ema)
    yield
    # Not in a ``finally``: after an error on one rank, this collective would wait for the others,
    # and the error would not be reported.
    state.restore_weights(backup)
