"""Transformer block over the positions of a level (pre-norm, layer scale: Touvron et al., ICCV 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.blocks.facts import BlockFacts
from pipeline.blocks.kind import BlockKind
from pipeline.blocks.layers import LayerNorm, Linear, drop_samples

FACTS = BlockFacts(title="transformer")

HEAD_CHANNELS = 32


def heads_for(channels: int) -> int:
    """Attention heads of about 32 channels each, a divisor of ``channels``."""
    return next(n for n in range(max(1, channels // HEAD_CHANNELS), 0, -1) if channels % n == 0)


class Attention(nn.Module):
    """Self-attention over the H * W positions of (N, H, W, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = heads_for(channels)
        self.qkv = Linear(channels, 3 * channels)
        self.project = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        qkv = self.qkv(x).view(n, height * width, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.project(mixed.transpose(1, 2).reshape(n, height, width, channels))
        return out


class TransformerBlock(nn.Module):
    """Attention and MLP on (N, H, W, C), each after a norm, scaled per channel and added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attention = Attention(channels)
        self.gamma1 = nn.Parameter(torch.full((channels,), 1e-6))
        self.norm2 = LayerNorm(channels)
        self.expand = Linear(channels, 4 * channels)
        self.project = Linear(4 * channels, channels)
        self.gamma2 = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """``keep`` (N,): 0 where the sample skips this block, else 1 / (1 - rate)."""
        x = x + drop_samples(self.gamma1 * self.attention(self.norm1(x)), keep)
        return x + drop_samples(
            self.gamma2 * self.project(functional.gelu(self.expand(self.norm2(x)))), keep
        )


KIND = BlockKind(TransformerBlock)
