"""The torch side of a block kind: the block, plus the stem, down and up modules that go with it.

The defaults are those of the classification models: convolution (or linear layer) and LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from pipeline.blocks.layers import CastTo, Conv, LayerNorm, Linear


class Stem(nn.Module):
    """(N, 3, H, W) -> (N, H/4, W/4, C0): convolution 4x4 with stride 4, norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cast = CastTo()
        self.conv = Conv(3, channels, 4, stride=4)
        self.norm = LayerNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.conv(self.cast(images.permute(0, 2, 3, 1)))))


class Down(nn.Module):
    """(N, H, W, C) of the finer level -> (N, H/2, W/2, C'): convolution 2x2 with stride 2, norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = Conv(inputs, outputs, 2, stride=2)
        self.norm = LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.conv(x)))


class Up(nn.Module):
    """(N, H, W, C) of a coarser level -> (N, H, W, C'): linear, norm. The caller upsamples."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = Linear(inputs, outputs)
        self.norm = LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.linear(x)))


@dataclass(frozen=True, kw_only=True)
class BlockKind:
    """Constructors of one block kind's modules.

    All modules must be deterministic and must not draw random numbers: the reversible backward pass
    runs them a second time and must get the same bits. Their inputs and outputs are contiguous
    (N, H, W, C) tensors.
    """

    # channels -> module called with (x, drop_path_scale). x is (N, H, W, C). drop_path_scale is
    # None, or (N,): 0 where the sample skips the block, else 1 / (1 - rate).
    block: Callable[[int], nn.Module]
    # channels -> module. The network takes the stem of its finest level's kind.
    stem: Callable[[int], nn.Module] = Stem
    # (input channels, output channels) -> module.
    down: Callable[[int, int], nn.Module] = Down
    up: Callable[[int, int], nn.Module] = Up
