"""The optimizer of a training stage and its parameter groups.

Groups differ by depth (layer decay) and by whether weight decay applies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import TrainConfig
from pipeline.model import Network
from pipeline.model.param_groups import decays, layer_id, num_layers
from pipeline.optimizers import registry

ParameterGroup = dict[str, Any]  # of a torch optimizer, with ``lr_scale`` and ``decayed`` added


class SkipNonfinite(torch.optim.Optimizer):
    """Base of optimizers that skip a step if any gradient is not finite.

    For ZeRO 0, whose engine does not check. The engines of ZeRO 1 to 3 skip such steps themselves.
    """

    overflow = False  # DeepSpeed reads this attribute: the engine counts the step as skipped
    refuses: Callable[[float], bool] | None = None  # see engine_hooks

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        gradients: list[Tensor] = [
            parameter.grad
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        self.overflow = not math.isfinite(norm)
        if not self.overflow and self.refuses is not None:
            self.overflow = self.refuses(norm)
        return None if self.overflow else super().step(closure)


def parameter_groups(model: Network, config: TrainConfig) -> list[ParameterGroup]:
    """Group the parameters by learning-rate factor and weight decay.

    The factor ``lr_scale`` of a parameter at depth d is layer_decay ** (depth of the heads - d).
    Example: with layer_decay 0.8, the heads train at 1.0, the layer below them at 0.8, the next
    one at 0.64. ``decayed`` tells whether weight decay is for this group, even if it is 0.
    """
    deepest = num_layers(model.spec)
    groups: dict[tuple[int, bool], ParameterGroup] = {}
    for name, parameter in model.named_parameters():
        # Under ZeRO-3 the parameter itself is empty; ``ds_shape`` is its shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        decayed = decays(name, len(shape), config.decay_alpha)
        # Without layer decay, one depth for all keeps the number of groups small.
        depth = layer_id(name, model.spec) if config.layer_decay < 1 else deepest
        group = groups.setdefault(
            (depth, decayed),
            {
                "params": [],
                "lr_scale": config.layer_decay ** (deepest - depth),
                "weight_decay": config.weight_decay if decayed else 0.0,
                "decayed": decayed,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def make_optimizer(model: Network, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of a training stage.

    Its learning rate is 0 until the schedule sets it, because DeepSpeed takes a step on zero
    gradients when it wraps the optimizer: with a rate, weight decay would change the weights.
    """
    kind = registry.kind(config.optimizer).optimizer
    optimizer_class: Callable[..., torch.optim.Optimizer] = kind
    if config.zero_stage == 0:
        # For example SkipNonfiniteAdamW, whose step is that of SkipNonfinite, then that of AdamW.
        name = f"SkipNonfinite{kind.__name__}"
        optimizer_class = type(name, (SkipNonfinite, kind), {})
    settings = {key: getattr(config, key) for key in registry.facts()[config.optimizer].keys}
    return optimizer_class(parameter_groups(model, config), lr=0.0, **settings)


def set_learning_rate(groups: list[ParameterGroup], rate: float) -> None:
    """Set the learning rate of every group for the next step."""
    for group in groups:
        group["lr"] = rate * group["lr_scale"]
