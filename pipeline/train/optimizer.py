"""AdamW parameter groups: by depth (layer decay) and by whether weight decay applies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import TrainConfig
from pipeline.model import Network
from pipeline.model.param_groups import decays, layer_id, num_layers


class FiniteAdamW(torch.optim.AdamW):
    """AdamW that leaves out a step on gradients that are not finite, for ZeRO 0, whose engine does not look (1 to 3 do)."""

    overflow = False  # DeepSpeed's name for it: the engine then counts the step as skipped

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        gradients: list[Tensor] = [
            p.grad for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        self.overflow = not bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        return None if self.overflow else super().step(closure)


def parameter_groups(model: Network, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups with ``lr_scale`` = layer_decay ** (depth of the heads - depth of the parameter), and their weight decay."""
    deepest = num_layers(model.spec)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        shape = getattr(
            parameter, "ds_shape", parameter.shape
        )  # under ZeRO-3 the shape before partitioning
        decayed = decays(name, len(shape), config.decay_alpha)
        depth = layer_id(name, model.spec) if config.layer_decay < 1 else deepest
        group = groups.setdefault(
            (depth, decayed),
            {
                "params": [],
                "lr_scale": config.layer_decay ** (deepest - depth),
                "weight_decay": config.weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def adamw(model: Network, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW whose rate is 0 until the schedule sets it (DeepSpeed takes a step on zero gradients when it is made)."""
    kind = FiniteAdamW if config.zero_stage == 0 else torch.optim.AdamW
    return kind(parameter_groups(model, config), lr=0.0, betas=config.betas, eps=config.eps)


def set_rate(groups: list[dict[str, Any]], rate: float) -> None:
    """Set every group's learning rate for the next step."""
    for group in groups:
        group["lr"] = rate * group["lr_scale"]
