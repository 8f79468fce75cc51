"""Example of a block kind: a bottleneck of two linear layers (SqueezeNet's idea, without filters).

To add it, put this file into ``pipeline/blocks/kinds/``. Nothing else changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.blocks.facts import BlockFacts
from pipeline.blocks.kind import BlockKind
from pipeline.blocks.layers import LayerNorm, Linear, drop_path

FACTS = BlockFacts(title="squeeze")


class SqueezeBlock(nn.Module):
    """(N, H, W, C): norm, linear to C / 2, GELU, linear to C, layer scale, shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm(channels)
        self.squeeze = Linear(channels, channels // 2)
        self.expand = Linear(channels // 2, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor, drop_path_scale: Tensor | None = None) -> Tensor:
        branch = self.gamma * self.expand(functional.gelu(self.squeeze(self.norm(x))))
        return x + drop_path(branch, drop_path_scale)


KIND = BlockKind(block=SqueezeBlock)
