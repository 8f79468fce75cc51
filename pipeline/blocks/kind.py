"""The torch side of a block kind: the block, plus the stem, down and up modules that go with it.

The defaults are those of the classification models: convolution (or linear layer) and LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from pipeline.blocks.layers import CastTo, Conv, LayerNorm, Linear

# A block's layer scale is a parameter of the block whose name starts with this word.
LAYER_SCALE = "gamma"


def stem_kernel(stride: int) -> int:
    """Kernel of a stem's convolution: 4x4 patches that do not overlap, 3x3 for a finer stride."""
    return 4 if stride == 4 else 3


class Stem(nn.Module):
    """(N, 3, H, W) -> (N, H/s, W/s, C0) for a stride s of 1, 2 or 4: convolution, norm."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        kernel = stem_kernel(stride)
        self.cast = CastTo()
        # A 3x3 is padded by one pixel, so that every pixel is the centre of a window at stride 1.
        self.conv = Conv(3, channels, kernel, stride=stride, padding=kernel % 2)
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
    # (channels, stride) -> module. The network takes the stem of its finest level's kind.
    stem: Callable[[int, int], nn.Module] = Stem
    # (input channels, output channels) -> module.
    down: Callable[[int, int], nn.Module] = Down
    up: Callable[[int, int], nn.Module] = Up
