"""One level of one column: fusion of its two inputs, blocks, and the scaled residual that makes columns reversible.

c[t][l] = F[t][l](lower, upper) + alpha[t][l] * c[t-1][l]      (paper, equation 2; no second term in column 0)
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.model.blocks import BLOCKS
from pipeline.model.layers import CastTo, Conv, LayerNorm, Linear
from pipeline.model.spec import NetworkSpec


class Residual(Protocol):
    """How a level's F and alpha become its output. An object, so that ZeRO's hooks do not walk the tensors it holds."""

    def __call__(self, f: Tensor, alpha: Tensor) -> Tensor: ...


class Down(nn.Module):
    """(N, H, W, C) of the finer level -> (N, H/2, W/2, C'): convolution 2x2 stride 2, norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = Conv(inputs, outputs, 2, stride=2)
        self.norm = LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.conv(x)))


class Up(nn.Module):
    """(N, H, W, C) of a coarser level -> (N, H, W, C'), to be added ``scale`` times larger: linear, norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = Linear(inputs, outputs)
        self.norm = LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.linear(x)))


def add_upsampled(x: Tensor, coarse: Tensor) -> Tensor:
    """``x`` (N, H, W, C) plus ``coarse`` (N, h, w, C) enlarged to its size (nearest); by broadcasting where sizes divide."""
    n, height, width, channels = x.shape
    h, w = coarse.shape[1:3]
    if height % h == 0 and width % w == 0:
        tiles = x.view(n, h, height // h, w, width // w, channels) + coarse.view(n, h, 1, w, 1, channels)
        return tiles.view(n, height, width, channels)
    enlarged = functional.interpolate(coarse.permute(0, 3, 1, 2), size=(height, width), mode="nearest")
    return x + enlarged.permute(0, 2, 3, 1)


class Level(nn.Module):
    """Level ``level`` of column ``column``. Called in the forward pass and again by the reversible backward pass."""

    def __init__(self, spec: NetworkSpec, column: int, level: int) -> None:
        super().__init__()
        width, first = spec.channels[level], column == 0
        self.cast = CastTo()
        self.down = Down(spec.channels[level - 1], width) if level > 0 else None
        self.up = Up(spec.channels[level + 1], width) if level < 3 and not first else None
        self.up_top = Up(spec.channels[3], width) if spec.huge and level == 0 and not first else None
        self.blocks = nn.ModuleList(BLOCKS[spec.block](width) for _ in range(spec.depths[level]))
        self.alpha = nn.Parameter(torch.full((width,), 0.5))

    def forward(
        self, lower: Tensor, upper: Tensor | None, top: Tensor | None, keep: Tensor | None, residual: Residual
    ) -> Tensor:
        """
        Args:
            lower: finer map of the same column (or the stem's output), (N, H', W', C').
            upper: coarser map of the previous column, or None.
            top: level 3 of the previous column (huge wiring, level 0 only), or None.
            keep: (blocks of this level, N) stochastic-depth factors, or None.
            residual: what to make of F and alpha.
        """
        h = self.cast(lower)
        if self.down is not None:
            h = self.down(h)
        if self.up is not None:
            assert upper is not None
            h = add_upsampled(h, self.up(self.cast(upper)))
        if self.up_top is not None:
            assert top is not None
            h = add_upsampled(h, self.up_top(self.cast(top)))
        for i, block in enumerate(self.blocks):
            h = block(h, None if keep is None else keep[i])
        f = h.to(lower.dtype) if h.dtype != lower.dtype else h
        return residual(f, self.alpha)


def inputs_of(level: int, x: Tensor, maps: list[Tensor], previous: list[Tensor] | None, huge: bool) -> tuple[
    Tensor, Tensor | None, Tensor | None
]:
    """(lower, upper, top) of a level: ``x`` the stem's output, ``maps`` of this column so far, ``previous`` column's maps."""
    lower = maps[level - 1] if level else x
    upper = previous[level + 1] if previous is not None and level < 3 else None
    top = previous[3] if previous is not None and level == 0 and huge else None
    return lower, upper, top
