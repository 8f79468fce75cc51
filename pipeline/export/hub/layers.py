"""Layers and blocks of the network in one file; see ``bundle``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

# --- bundled from here on ---

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)
_HEAD_CHANNELS = 32  # per attention head, or more where the channels do not divide


def channels_first(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W) in channels-last memory: only the names change."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C), contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def _drop_path(branch: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: skip the branch of random samples."""
    if rate == 0 or not training:
        return branch
    keep = branch.new_empty((branch.shape[0], 1, 1, 1)).bernoulli_(1 - rate)
    return branch * keep / (1 - rate)


# The names of the layers and of their parts are those of the network in training, so that the
# weights of both have the same names.
class _Conv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return channels_last(super().forward(channels_first(x)))


class _ConvNorm(nn.Module):
    """Convolution, BatchNorm, and SiLU unless ``linear``."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        # Odd kernels are centred on a pixel. Even ones cover the pixels that they merge.
        padding = kernel // 2 if kernel % 2 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(channels_first(x)))
        return channels_last(x if self.linear else functional.silu(x))


class _Stem(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        # 4x4 patches that do not overlap, as published; 3x3 for a finer stride.
        kernel = 4 if stride == 4 else 3
        self.conv = _Conv(inputs, outputs, kernel, stride, kernel % 2)
        self.norm = LAYER_NORM(outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images.permute(0, 2, 3, 1)))  # type: ignore[no-any-return]


class _Down(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = _Conv(inputs, outputs, 2, 2)
        self.norm = LAYER_NORM(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


class _Up(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = LAYER_NORM(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))  # type: ignore[no-any-return]


class _ConvNeXt(nn.Module):
    def __init__(self, channels: int, drop_path: float) -> None:
        super().__init__()
        self.depthwise = _Conv(channels, channels, 3, padding=1, groups=channels)
        self.norm = LAYER_NORM(channels)
        self.expand = nn.Linear(channels, 4 * channels)
        self.project = nn.Linear(4 * channels, channels)
        # Layer scale: a block begins as nearly nothing beside its shortcut.
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        branch = self.project(functional.gelu(self.expand(self.norm(self.depthwise(x)))))
        return x + _drop_path(self.gamma * branch, self.drop_path, self.training)


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        # Example: 96 channels have 3 heads of 32; 80 channels have 2 heads of 40.
        most = max(1, channels // _HEAD_CHANNELS)
        self.heads = next(heads for heads in range(most, 0, -1) if channels % heads == 0)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        # Every pixel attends to all pixels of its map.
        qkv = self.qkv(x).view(n, height * width, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return self.project(attended.reshape(n, height, width, channels))  # type: ignore[no-any-return]


class _Transformer(nn.Module):
    def __init__(self, channels: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LAYER_NORM(channels)
        self.attention = _Attention(channels)
        self.gamma1 = nn.Parameter(torch.full((channels,), 1e-6))
        self.norm2 = LAYER_NORM(channels)
        self.expand = nn.Linear(channels, 4 * channels)
        self.project = nn.Linear(4 * channels, channels)
        self.gamma2 = nn.Parameter(torch.full((channels,), 1e-6))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        branch = self.gamma1 * self.attention(self.norm1(x))
        x = x + _drop_path(branch, self.drop_path, self.training)
        branch = self.gamma2 * self.project(functional.gelu(self.expand(self.norm2(x))))
        return x + _drop_path(branch, self.drop_path, self.training)


class _C2fStem(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = _ConvNorm(inputs, outputs, 4 if stride == 4 else 3, stride)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images.permute(0, 2, 3, 1))  # type: ignore[no-any-return]


class _C2f(nn.Module):
    def __init__(self, channels: int, drop_path: float) -> None:
        super().__init__()
        half = channels // 2
        self.split = _ConvNorm(channels, 2 * half, 1)
        self.first = _ConvNorm(half, half, 3)
        self.second = _ConvNorm(half, half, 3)
        self.merge = _ConvNorm(3 * half, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # The output sees three depths: both halves, and the second after two convolutions.
        a, b = self.split(x).chunk(2, -1)
        return self.merge(torch.cat([a, b, self.second(self.first(b))], -1))  # type: ignore[no-any-return]


class _ResidualStem(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        # The pooling takes the last factor of 2, so that the convolution sees the finer pixels.
        self.pooling = min(stride, 2)
        self.conv = nn.Conv2d(inputs, outputs, 3, stride // self.pooling, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.conv(channels_first(channels_last(images)))))
        return channels_last(functional.max_pool2d(x, self.pooling))


class _ResidualDown(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(self.norm(self.conv(functional.max_pool2d(channels_first(x), 2))))


class _Residual(nn.Module):
    def __init__(self, channels: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv1(functional.relu(self.norm1(channels_first(x))))
        branch = self.conv2(functional.relu(self.norm2(branch)))
        return x + _drop_path(channels_last(branch), self.drop_path, self.training)


# Kind of block -> its block, and the stem, down and up modules that go with it.
_Parts = tuple[Callable[..., nn.Module], ...]
KINDS: dict[str, _Parts] = {
    "convnext": (_ConvNeXt, _Stem, _Down, _Up),
    "transformer": (_Transformer, _Stem, _Down, _Up),
    "c2f": (
        _C2f,
        _C2fStem,
        partial(_ConvNorm, kernel=2, stride=2, linear=True),
        partial(_ConvNorm, kernel=1),
    ),
    "residual": (
        _Residual,
        _ResidualStem,
        _ResidualDown,
        partial(_ConvNorm, kernel=1, linear=True),
    ),
}
