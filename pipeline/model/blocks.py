"""Blocks that a level is made of. A new block is one class (channels -> module) and one entry in ``BLOCKS``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.model.layers import Conv, LayerNorm, Linear


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
        branch = self.gamma * self.project(functional.gelu(self.expand(self.norm(self.depthwise(x)))))
        if keep is not None:
            branch = branch * keep.to(branch.dtype).view(-1, 1, 1, 1)
        return x + branch


BLOCKS: dict[str, Callable[[int], nn.Module]] = {"convnext": ConvNeXtBlock}
