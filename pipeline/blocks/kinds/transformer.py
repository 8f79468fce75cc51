"""Transformer block over a level's pixels (pre-norm; layer scale: Touvron et al., ICCV 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.blocks.facts import BlockFacts
from pipeline.blocks.kind import BlockKind
from pipeline.blocks.layers import LayerNorm, Linear, drop_path

FACTS = BlockFacts(
    title="transformer", weights=12.0, vectors=15.0, depthwise=0.0, attention=True, saved=19.0
)

HEAD_CHANNELS = 32  # target channels per attention head


def heads_for(channels: int) -> int:
    """Return the largest number of heads that divides ``channels`` and leaves 32 per head, or 1.

    Example: 96 channels -> 3 heads of 32. 80 channels -> 2 heads of 40. 20 channels -> 1 head.
    """
    most = max(1, channels // HEAD_CHANNELS)
    return next(heads for heads in range(most, 0, -1) if channels % heads == 0)


class Attention(nn.Module):
    """Self-attention over the H * W pixels of (N, H, W, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = heads_for(channels)
        self.qkv = Linear(channels, 3 * channels)
        self.project = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        qkv = self.qkv(x).view(n, height * width, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (N, heads, pixels, head width)
        attended = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.project(attended.transpose(1, 2).reshape(n, height, width, channels))
        return out


class TransformerBlock(nn.Module):
    """(N, H, W, C): attention, then MLP. Each has a norm, a layer scale and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attention = Attention(channels)
        self.gamma1 = nn.Parameter(torch.full((channels,), 1e-6))  # layer scale
        self.norm2 = LayerNorm(channels)
        self.expand = Linear(channels, 4 * channels)
        self.project = Linear(4 * channels, channels)
        self.gamma2 = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor, drop_path_scale: Tensor | None = None) -> Tensor:
        """Run the block. ``drop_path_scale`` (N,): 0 to skip it, else 1 / (1 - rate)."""
        x = x + drop_path(self.gamma1 * self.attention(self.norm1(x)), drop_path_scale)
        return x + drop_path(
            self.gamma2 * self.project(functional.gelu(self.expand(self.norm2(x)))), drop_path_scale
        )


KIND = BlockKind(block=TransformerBlock)
