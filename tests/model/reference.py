"""Reference for exact columns: the same arithmetic with stored activations under plain autograd.

Written independently of the model's own kernels, so that the two can be compared.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.model import Network
from pipeline.model.network import Backbone

SCALE = 2.0**18


class FixedPoint:
    """quantize(F) + alpha * c_prev in whole float64 numbers, with the gradients of the float sum.

    ``value`` is c_prev as a float map, ``integers`` in steps of the stream. None: column 0.
    """

    def __init__(self, value: Tensor | None, integers: Tensor | None) -> None:
        self.value = value
        self.integers = integers

    def __call__(self, f: Tensor, alpha: Tensor) -> Tensor:
        total = torch.floor(f.detach().double() * SCALE + 0.5)
        plain = f
        if self.integers is not None and self.value is not None:
            magnitude = (alpha.detach().double().abs() * SCALE + 0.5).floor().clamp(min=263) / SCALE
            sign = torch.where(alpha.detach() < 0, -1.0, 1.0).double()
            total = total + sign * torch.floor(magnitude * self.integers + 0.5)
            plain = f + ((magnitude * sign).to(f.dtype) + (alpha - alpha.detach())) * self.value
        self.integers = total
        # The second term is 0. It only carries the gradient (straight-through rounding).
        return (total / SCALE).to(f.dtype) + (plain - plain.detach())


def features(
    backbone: Backbone, images: Tensor, uniforms: Tensor | None = None, taps: tuple[int, ...] = ()
) -> tuple[Tensor, ...]:
    """Compute what ``Backbone.features`` computes, with all activations stored."""
    x = backbone.stem(images)
    x = x.float() if x.dtype == torch.bfloat16 else x  # the stream is never narrower
    scales = backbone._drop_path_scales(x, uniforms)
    previous: list[Tensor] = []
    integers: list[Any] = [None] * 4
    tapped = []
    for t, column in enumerate(backbone.columns):
        maps: list[Tensor] = []
        begin = 0
        for i, level in enumerate(column.levels):  # type: ignore[union-attr,arg-type]
            residual = FixedPoint(previous[i] if t else None, integers[i])
            scale = None if scales is None else scales[t, begin : begin + len(level.blocks)]
            begin += len(level.blocks)
            upper = previous[i + 1] if t and i < 3 else None
            top = previous[3] if t and i == 0 and backbone.spec.huge else None
            maps.append(level(maps[i - 1] if i else x, upper, top, scale, residual))
            integers[i] = residual.integers
        previous = maps
        if t in taps:
            tapped.append(maps[3])
    return (*tapped, *previous)


def as_reference(network: Network) -> Network:
    """Make the network compute its features with the reference arithmetic. Returns the network."""
    network.features = partial(features, network)  # type: ignore[method-assign]
    return network
