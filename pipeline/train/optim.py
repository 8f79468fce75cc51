"""AdamW parameter groups: by depth (layer decay) and by whether weight decay applies."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.config.schema import TrainConfig
from pipeline.model import Network
from pipeline.model.groups import decays, layer_id, num_layers


def parameter_groups(model: Network, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups with ``lr_scale`` = layer_decay ** (depth of the heads - depth of the parameter), and their weight decay."""
    deepest = num_layers(model.spec)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 the shape before partitioning
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
    return torch.optim.AdamW(parameter_groups(model, config), lr=0.0, betas=config.betas, eps=config.eps)


def set_rate(groups: list[dict[str, Any]], rate: float) -> None:
    """Set every group's learning rate for the next step."""
    for group in groups:
        group["lr"] = rate * group["lr_scale"]
