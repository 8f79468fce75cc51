"""Residual block with two 3x3 convolutions and BatchNorm (ResNet v2: He et al., ECCV 2016).

For small images and short training on CPUs. A 3x3 convolution computes much per element that it
reads and writes, which is what a CPU is slow at, and max pooling keeps small shifts of a small
image from changing its maps.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from pipeline.blocks.facts import BlockFacts
from pipeline.blocks.kind import BlockKind
from pipeline.blocks.kinds.c2f import BatchNorm, BiaslessConv, ConvNorm
from pipeline.blocks.layers import CastTo, drop_path

FACTS = BlockFacts(
    title="residual",
    running_statistics=True,
    weights=18.0,
    vectors=4.0,
    depthwise=0.0,
    saved=5.0,
    widest=1.0,
    layer_vectors=2.0,
    down_taps=1,
    stem_pooling=2,
)


def channels_first(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W) in channels-last memory format: only the names change."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C), contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


class ResidualStem(nn.Module):
    """(N, 3, H, W) -> (N, H/s, W/s, C0) for a stride s of 1, 2 or 4: convolution, norm, pooling.

    The pooling takes the last factor of 2, so that the convolution sees the finer pixels.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.cast = CastTo()
        self.pooling = min(stride, 2)
        self.conv = BiaslessConv(3, channels, 3, stride // self.pooling)
        self.norm = BatchNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        x = channels_first(self.cast(channels_last(images)))
        x = functional.relu(self.norm(self.conv(x)), inplace=True)
        return channels_last(functional.max_pool2d(x, self.pooling))


class ResidualDown(nn.Module):
    """(N, H, W, C) of the finer level -> (N, H/2, W/2, C'): max pooling, 1x1 convolution, norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = BiaslessConv(inputs, outputs, 1, 1)
        self.norm = BatchNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(self.norm(self.conv(functional.max_pool2d(channels_first(x), 2))))


class ResidualBlock(nn.Module):
    """(N, H, W, C): twice norm, ReLU and 3x3 convolution; drop path; shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = BatchNorm(channels)
        self.conv1 = BiaslessConv(channels, channels, 3, 1)
        self.norm2 = BatchNorm(channels)
        self.conv2 = BiaslessConv(channels, channels, 3, 1)

    def forward(self, x: Tensor, drop_path_scale: Tensor | None = None) -> Tensor:
        """Run the block. ``drop_path_scale`` (N,): 0 to skip it, else 1 / (1 - rate)."""
        branch = self.conv1(functional.relu(self.norm1(channels_first(x)), inplace=True))
        branch = self.conv2(functional.relu(self.norm2(branch), inplace=True))
        return x + drop_path(channels_last(branch), drop_path_scale)


KIND = BlockKind(
    block=ResidualBlock,
    stem=ResidualStem,
    down=ResidualDown,
    up=partial(ConvNorm, kernel=1, linear=True),
)
