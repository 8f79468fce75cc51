"""What a kind of block brings along: the block itself and the fusion that goes with it (convolution and norm by default)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from pipeline.blocks.layers import CastTo, Conv, LayerNorm, Linear


class Stem(nn.Module):
    """(N, 3, H, W) -> (N, H/4, W/4, C0): convolution 4x4 stride 4, norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cast = CastTo()
        self.conv = Conv(3, channels, 4, stride=4)
        self.norm = LayerNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.conv(self.cast(images.permute(0, 2, 3, 1)))))


class Down(nn.Module):
    """(N, H, W, C) of the finer level -> (N, H/2, W/2, C'): convolution 2x2 stride 2, norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = Conv(inputs, outputs, 2, stride=2)
        self.norm = LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.conv(x)))


class Up(nn.Module):
    """(N, H, W, C) of a coarser level -> (N, H, W, C'), to be enlarged where it is added: linear, norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = Linear(inputs, outputs)
        self.norm = LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.linear(x)))


@dataclass(frozen=True)
class BlockKind:
    """``block``: channels -> module called with (x (N, H, W, C), keep (N,) or None); it must be deterministic and hold no
    random state. ``stem``: channels -> module; ``down``, ``up``: (inputs, outputs) -> module."""

    block: Callable[[int], nn.Module]
    stem: Callable[[int], nn.Module] = Stem
    down: Callable[[int, int], nn.Module] = Down
    up: Callable[[int, int], nn.Module] = Up
