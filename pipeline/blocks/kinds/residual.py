"""Residual block with two 3x3 convolutions and BatchNorm (ResNet v2: He et al., ECCV 2016).

Of the kinds it computes most per number that it writes to memory, so on a CPU it is the fastest to
train. It suits small images and short schedules.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from pipeline.blocks.facts import BlockFacts
from pipeline.blocks.kind import BlockKind
from pipeline.blocks.kinds.c2f import BatchNorm, BiaslessConv, C2fStem, ConvNorm
from pipeline.blocks.layers import drop_path

FACTS = BlockFacts(title="residual", running_statistics=True)


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
        # permute only relabels the dimensions: (N, C, H, W) in channels-last memory format.
        branch = self.conv1(functional.relu(self.norm1(x.permute(0, 3, 1, 2)), inplace=True))
        branch = self.conv2(functional.relu(self.norm2(branch), inplace=True))
        return x + drop_path(branch.permute(0, 2, 3, 1).contiguous(), drop_path_scale)


KIND = BlockKind(
    block=ResidualBlock,
    stem=C2fStem,
    down=partial(ConvNorm, kernel=2, stride=2, linear=True),
    up=partial(ConvNorm, kernel=1, linear=True),
)
