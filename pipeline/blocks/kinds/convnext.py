"""ConvNeXt block (Liu et al., CVPR 2022) as RevCol uses it: depthwise convolution 3x3."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.blocks.facts import BlockFacts
from pipeline.blocks.kind import BlockKind
from pipeline.blocks.layers import Conv, LayerNorm, Linear, drop_path

FACTS = BlockFacts(
    title="ConvNeXt",
    published_names={"depthwise.": "dwconv.", "expand.": "pwconv1.", "project.": "pwconv2."},
)


class ConvNeXtBlock(nn.Module):
    """(N, H, W, C): depthwise 3x3, norm, expansion, GELU, projection, layer scale, drop path."""

    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__()
        self.depthwise = Conv(channels, channels, 3, padding=1, groups=channels)
        self.norm = LayerNorm(channels)
        self.expand = Linear(channels, expansion * channels)
        self.project = Linear(expansion * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))  # layer scale

    def forward(self, x: Tensor, drop_path_scale: Tensor | None = None) -> Tensor:
        """Run the block. ``drop_path_scale`` (N,): 0 to skip it, else 1 / (1 - rate)."""
        branch = self.gamma * self.project(
            functional.gelu(self.expand(self.norm(self.depthwise(x))))
        )
        return x + drop_path(branch, drop_path_scale)


KIND = BlockKind(block=ConvNeXtBlock)
