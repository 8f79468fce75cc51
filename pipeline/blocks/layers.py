"""Small layers on channels-last tensors (N, H, W, C): one memory layout everywhere, so that a recompute is bit-identical."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def init_weights(module: nn.Module) -> None:
    """Truncated normal (std 0.02) weights and zero biases for a convolution or a linear layer."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Conv(nn.Conv2d):
    """Convolution (N, H, W, C) -> (N, H', W', C'), initialised as the paper does."""

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
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class Linear(nn.Linear):
    """Linear layer over the last dimension, initialised as the paper does, times ``init_scale``."""

    def __init__(self, inputs: int, outputs: int, init_scale: float = 1.0) -> None:
        self.init_scale = init_scale  # first: nn.Linear's constructor calls reset_parameters
        super().__init__(inputs, outputs)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # Here, not in a parent's constructor: ZeRO-3 partitions a layer's parameters as soon as the layer is made.
        init_weights(self)
        self.weight.mul_(self.init_scale)


class LayerNorm(nn.LayerNorm):
    """Normalisation over channels (the last dimension), eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)


def drop_samples(branch: Tensor, keep: Tensor | None) -> Tensor:
    """Stochastic depth as an input: ``branch`` (N, H, W, C) times ``keep`` (N,), or unchanged."""
    return branch if keep is None else branch * keep.to(branch.dtype).view(-1, 1, 1, 1)


class CastTo(nn.Module):
    """Casts to the dtype in which the network computes; ``None`` leaves tensors as they come.

    An attribute rather than the dtype of a weight: reading a child's weight in a parent's forward would make ZeRO-3 keep
    it gathered to the end of the backward pass. Always a node of the graph, so that what a part sends back through its
    input is summed before it joins the gradients of other parts: the same order, hence the same bits, in every mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x) if self.dtype is None else x.to(self.dtype)
