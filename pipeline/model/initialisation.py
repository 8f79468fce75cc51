"""Initial weights of a network.

The published ones (truncated normal of std 0.02, layer scale 1e-6) are drawn by the layers
themselves. They suit wide networks and long schedules and starve narrow ones. Example: an output of
a linear layer with 16 inputs of variance 1 has a standard deviation of sqrt(16) * 0.02 = 0.08, that
of one with 2880 inputs sqrt(2880) * 0.02 = 1.07. Fan-in weights keep it at 1 for every width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from pipeline.blocks.kind import LAYER_SCALE
from pipeline.blocks.layers import Linear
from pipeline.model.spec import NetworkSpec


def initialise(network: nn.Module, spec: NetworkSpec) -> None:
    """Give freshly constructed modules the initial weights of ``spec``, in place."""
    # Module.apply and not a loop over modules(): under ZeRO-3 parameters are partitioned as soon
    # as their layer is constructed, and DeepSpeed gathers them around every call that apply makes.
    if spec.init == "fan_in":
        network.apply(_draw_fan_in)
    if spec.layer_scale != NetworkSpec.layer_scale:
        network.apply(partial(_fill_layer_scale, value=spec.layer_scale))


@torch.no_grad()
def _draw_fan_in(module: nn.Module) -> None:
    """Draw normal weights of std 1 / sqrt(fan-in); biases stay zero."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    if isinstance(module, Linear):
        module.weight.mul_(module.init_scale)


@torch.no_grad()
def _fill_layer_scale(module: nn.Module, value: float) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith(LAYER_SCALE):
            parameter.fill_(value)
