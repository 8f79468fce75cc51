"""ConvNeXt block (Liu et al., CVPR 2022), as RevCol uses it: depthwise 3x3."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.blocks.facts import BlockFacts
from pipeline.blocks.kind import BlockKind
from pipeline.blocks.layers import Conv, LayerNorm, Linear, drop_samples

FACTS = BlockFacts(
    title="ConvNeXt",
    published_names={"depthwise.": "dwconv.", "expand.": "pwconv1.", "project.": "pwconv2."},
)


class ConvNeXtBlock(nn.Module):
    """ConvNeXt block on (N, H, W, C): depthwise 3x3, norm, expansion, GELU, projection, layer scale, stochastic depth."""

    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__()
        self.depthwise = Conv(channels, channels, 3, padding=1, groups=channels)
        self.norm = LayerNorm(channels)
        self.expand = Linear(channels, expansion * channels)
        self.project = Linear(expansion * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """``keep`` (N,): 0 where the sample skips this block, else 1 / (1 - rate)."""
        branch = self.gamma * self.project(
            functional.gelu(self.expand(self.norm(self.depthwise(x))))
        )
        return x + drop_samples(branch, keep)


KIND = BlockKind(ConvNeXtBlock)
