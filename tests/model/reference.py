"""The stored evaluation of the exact columns' arithmetic: plain operations under plain autograd, straight-through rounding.

Written apart from the model's own passes, so that the two can be compared.
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
    """quantize(F) + alpha * c_prev in whole float64 numbers; value exact, gradients those of F + alpha * c_prev."""

    def __init__(self, value: Tensor | None, integers: Tensor | None) -> None:
        self.value, self.integers = value, integers

    def __call__(self, f: Tensor, alpha: Tensor) -> Tensor:
        total, plain = torch.floor(f.detach().double() * SCALE + 0.5), f
        if self.integers is not None and self.value is not None:
            magnitude = (alpha.detach().double().abs() * SCALE + 0.5).floor().clamp(min=263) / SCALE
            sign = torch.where(alpha.detach() < 0, -1.0, 1.0).double()
            total = total + sign * torch.floor(magnitude * self.integers + 0.5)
            plain = f + ((magnitude * sign).to(f.dtype) + (alpha - alpha.detach())) * self.value
        self.integers = total
        return (total / SCALE).to(f.dtype) + (plain - plain.detach())


def features(
    backbone: Backbone, images: Tensor, uniforms: Tensor | None = None, taps: tuple[int, ...] = ()
) -> tuple[Tensor, ...]:
    """What ``Backbone.features`` gives, with everything stored."""
    x = backbone.stem(images)
    x = x.float() if x.dtype == torch.bfloat16 else x  # the stream is never narrower
    keep = backbone._keep(x, uniforms)
    previous: list[Tensor] = []
    integers: list[Any] = [None] * 4
    tapped = []
    for t, column in enumerate(backbone.columns):
        maps: list[Tensor] = []
        begin = 0
        for i, level in enumerate(column.levels):  # type: ignore[union-attr,arg-type]
            residual = FixedPoint(previous[i] if t else None, integers[i])
            kept = None if keep is None else keep[t, begin : begin + len(level.blocks)]
            begin += len(level.blocks)
            upper = previous[i + 1] if t and i < 3 else None
            top = previous[3] if t and i == 0 and backbone.spec.huge else None
            maps.append(level(maps[i - 1] if i else x, upper, top, kept, residual))
            integers[i] = residual.integers
        previous = maps
        if t in taps:
            tapped.append(maps[3])
    return (*tapped, *previous)


def as_reference(network: Network) -> Network:
    """The network, computing its features as above."""
    network.features = partial(features, network)  # type: ignore[method-assign]
    return network
