"""The lower bound of |alpha|, the factors by which reversible columns scale their inputs.

The inverse of a column divides by alpha, so |alpha| must stay away from zero. The published code
clamps alpha in the forward pass. Under DeepSpeed that would be lost: the fp32 weights overwrite the
clamped copy after every step. So the clamp works on the fp32 weights, right after the update.
"""

from __future__ import annotations

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


@torch.no_grad()
def smallest_alpha(state: ShardedState) -> list[list[float]]:
    """min |alpha| for each [column][level], over all ranks. Collective; waits for the device."""
    # A rank that owns nothing of an alpha contributes infinity to the minimum.
    smallest = torch.full((state.engine.module.spec.columns, 4), torch.inf)
    for fragment in state.fragments:
        if is_alpha(fragment.name):
            # columns.<column>.levels.<level>.alpha
            _, column, _, level, _ = fragment.name.split(".")
            value = fragment.of(state.flats).abs().min().cpu()
            entry = smallest[int(column), int(level)]
            smallest[int(column), int(level)] = torch.minimum(entry, value)
    torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
    result: list[list[float]] = smallest.tolist()
    return result


def _clamp(alpha: Tensor) -> None:
    alpha.copy_(
        torch.where(alpha >= 0, alpha.clamp(min=ALPHA_LIMIT), alpha.clamp(max=-ALPHA_LIMIT))
    )
