"""A say of ours in DeepSpeed's decision whether to apply an update.

Before every update the engine reads the norm of all gradients, over all ranks, and skips the step
if the norm is not finite. Here a judge sees the norm first; if it refuses, the engine is given
infinity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.train.engine import DeepSpeedEngine


def judge_updates(engine: DeepSpeedEngine, refuses: Callable[[float], bool]) -> None:
    """Let ``refuses`` see the norm of the gradients of every update. It may be collective.

    It is not asked about gradients that are not finite: those steps are skipped anyway. Under
    ZeRO 0 the norm is that after clipping.
    """
    optimizer: Any = engine.optimizer
    stage = engine.zero_optimization_stage()

    def judged(norm: Tensor) -> Tensor:
        # DeepSpeed gives -1 for a norm that is not finite.
        value = float(norm)
        if not math.isfinite(value) or value < 0:
            return norm
        return torch.full_like(norm, torch.inf) if refuses(value / optimizer.loss_scale) else norm

    if stage == 0:
        # `SkipNonfinite`, or DeepSpeed's thin wrapper of it.
        getattr(optimizer, "optimizer", optimizer).refuses = refuses
    elif stage == 3:
        # ZeRO 3 combines the norms of its groups itself: the judge's answer is one group.
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norms_of_groups = optimizer._get_norm_groups
        optimizer._get_norm_groups = lambda: [judged(combine_grad_norm_groups(norms_of_groups()))]
    else:
        global_norm = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda: judged(global_norm())
