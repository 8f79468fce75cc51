"""Small layers on channels-last tensors (N, H, W, C).

Every tensor has the same memory layout. A different stride order can select another kernel, and
then a recompute would not be bit-identical to the forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def init_weights(module: nn.Module) -> None:
    """Initialise a convolution or linear layer: truncated normal weights (std 0.02), zero bias."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Conv(nn.Conv2d):
    """Convolution (N, H, W, C) -> (N, H', W', C'), initialised as in the paper."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups)

    def reset_parameters(self) -> None:
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        # permute only relabels the dimensions: (N, C, H, W) in channels-last memory format.
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class Linear(nn.Linear):
    """Linear layer over the last dimension. The initial weight is scaled by ``init_scale``."""

    def __init__(self, inputs: int, outputs: int, init_scale: float = 1.0) -> None:
        # Set before nn.Linear's constructor, which calls reset_parameters.
        self.init_scale = init_scale
        super().__init__(inputs, outputs)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # Scale here and not in a parent's constructor: ZeRO-3 partitions a layer's parameters as
        # soon as the layer is constructed, so the parent would no longer see the full weight.
        init_weights(self)
        self.weight.mul_(self.init_scale)


class LayerNorm(nn.LayerNorm):
    """Normalisation over channels (the last dimension), eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)


def drop_path(branch: Tensor, scale: Tensor | None) -> Tensor:
    """Stochastic depth as an input: ``branch`` (N, H, W, C) times ``scale`` (N,), if not None.

    The scale is an argument and not drawn here, so that the recompute in the backward pass drops
    the same samples without saving the state of a random number generator.
    """
    return branch if scale is None else branch * scale.to(branch.dtype).view(-1, 1, 1, 1)


class CastTo(nn.Module):
    """Casts to the dtype in which the network computes. ``dtype = None`` leaves tensors unchanged.

    The dtype is an attribute. Reading it from a child's weight in a parent's forward would make
    ZeRO-3 keep that weight gathered until the end of the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        # Without a cast, still add a graph node (view_as). Autograd then sums the gradients that
        # this module's consumers send back before it adds those of other consumers of x. The order
        # of the sums, and so every bit, is the same in all activation modes.
        return x.view_as(x) if self.dtype is None else x.to(self.dtype)
