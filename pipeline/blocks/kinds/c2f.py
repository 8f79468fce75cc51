"""C2f block with BatchNorm and SiLU (YOLOv8's C2f with n = 1, without shortcut), for detection."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.blocks.facts import BlockFacts
from pipeline.blocks.kind import BlockKind, stem_kernel
from pipeline.blocks.layers import CastTo, init_weights

FACTS = BlockFacts(
    title="C2f",
    shortcut=False,
    running_statistics=True,
    weights=7.0,
    vectors=6.0,
    depthwise=0.0,
    saved=11.0,
    widest=1.5,
    layer_vectors=2.0,
)


class BiaslessConv(nn.Conv2d):
    """Convolution without bias on (N, C, H, W), initialised like the other layers."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        # Odd kernels are centred on a pixel. Even ones cover the pixels that they merge.
        padding = kernel // 2 if kernel % 2 else 0
        super().__init__(inputs, outputs, kernel, stride, padding, bias=False)

    def reset_parameters(self) -> None:
        init_weights(self)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that keeps its running statistics in float32 when the weights are bf16 or fp16.

    With momentum 0.1 an update adds a tenth of a small difference to the running mean. In bf16 it
    would be rounded away: 1.0 + 0.1 * 0.01 = 1.001 rounds back to 1.0.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm:
        # nn.Module.to, .bfloat16 and the like call _apply. Widen the statistics again after it.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("running_mean", "running_var"):
            value = getattr(self, name)
            setattr(self, name, value.float() if value.itemsize < 4 else value)
        return self

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        # batch_norm wants weight and bias in the dtype of the statistics.
        statistics_dtype = self.running_mean.dtype
        return functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            weight=self.weight.to(statistics_dtype),
            bias=self.bias.to(statistics_dtype),
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )


class ConvNorm(nn.Module):
    """(N, H, W, C) -> (N, H', W', C'): convolution, BatchNorm, SiLU unless ``linear``."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        self.conv = BiaslessConv(inputs, outputs, kernel, stride)
        self.norm = BatchNorm(outputs)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        # permute only relabels the dimensions: (N, C, H, W) in channels-last memory format.
        x = self.norm(self.conv(x.permute(0, 3, 1, 2)))
        return (x if self.linear else functional.silu(x)).permute(0, 2, 3, 1).contiguous()


class C2fStem(nn.Module):
    """(N, 3, H, W) -> (N, H/s, W/s, C0) for a stride s of 1, 2 or 4."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.cast = CastTo()
        self.conv = ConvNorm(3, channels, stem_kernel(stride), stride)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.conv(self.cast(images.permute(0, 2, 3, 1)))
        return x


class C2fBlock(nn.Module):
    """(N, H, W, C): 1x1 to two halves, two 3x3 on the second half, 1x1 over all three parts."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.split = ConvNorm(channels, 2 * half, 1)
        self.first = ConvNorm(half, half, 3)
        self.second = ConvNorm(half, half, 3)
        self.merge = ConvNorm(3 * half, channels, 1)

    def forward(self, x: Tensor, drop_path_scale: Tensor | None = None) -> Tensor:
        """Run the block. ``drop_path_scale`` must be None: a dropped block would have no output."""
        # The output sees three depths: the first half, the second, and the second after two 3x3.
        a, b = self.split(x).chunk(2, -1)
        merged: Tensor = self.merge(torch.cat([a, b, self.second(self.first(b))], -1))
        return merged


KIND = BlockKind(
    block=C2fBlock,
    stem=C2fStem,
    down=partial(ConvNorm, kernel=2, stride=2, linear=True),
    up=partial(ConvNorm, kernel=1),
)
