"""The lower bound of |alpha|, the factors by which reversible columns scale their inputs.

The inverse of a column divides by alpha, so |alpha| must stay away from zero. The published code
clamps alpha in the forward pass. Under DeepSpeed that would be lost: the fp32 weights overwrite the
clamped copy after every step. So the clamp works on the fp32 weights, right after the update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.fixed_point import ALPHA_LIMIT
from pipeline.model.param_groups import is_alpha
from pipeline.train.zero_state import ShardedState


@torch.no_grad()
def clamp_alpha(state: ShardedState) -> None:
    """Keep |alpha| >= ``ALPHA_LIMIT``; the sign stays, zero becomes positive.

    1. The fp32 weights that this rank owns.
    2. The low-precision copies: they were made before the clamp, so without this the next forward
       pass would read values that are one step old.
    """
    # No communication: each rank clamps what it owns.
    for fragment in state.fragments:
        if is_alpha(fragment.name):
            _clamp(fragment.of(state.flats))
    for name in state.parameters:
        if is_alpha(name):
            for copy in state.low_precision_copies(name):
                _clamp(copy)


@dataclass(frozen=True)
class AlphaRange:
    """Smallest and largest |alpha| of each [column][level], over all ranks."""

    smallest: list[list[float]]
    largest: list[list[float]]


@torch.no_grad()
def alpha_range(state: ShardedState) -> AlphaRange:
    """The range of |alpha|. Collective; waits for the device once."""
    fragments = [fragment for fragment in state.fragments if is_alpha(fragment.name)]
    # A rank that owns nothing of an alpha contributes infinity to both minima: largest is -min(-x).
    extremes = torch.full((2, state.engine.module.spec.columns, 4), torch.inf)
    if fragments:
        values = [fragment.of(state.flats).abs() for fragment in fragments]
        ranges = torch.stack([torch.stack([value.min(), -value.max()]) for value in values]).cpu()
        for fragment, own in zip(fragments, ranges, strict=True):
            # columns.<column>.levels.<level>.alpha
            _, column, _, level, _ = fragment.name.split(".")
            entry = extremes[:, int(column), int(level)]
            entry.copy_(torch.minimum(entry, own))
    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MIN)
    smallest, largest = extremes
    return AlphaRange(smallest.tolist(), (-largest).tolist())


def _clamp(alpha: Tensor) -> None:
    alpha.copy_(
        torch.where(alpha >= 0, alpha.clamp(min=ALPHA_LIMIT), alpha.clamp(max=-ALPHA_LIMIT))
    )
