"""One level of one column: fusion of its two inputs, blocks, and the scaled residual that makes columns reversible.

c[t][l] = F[t][l](lower, upper) + alpha[t][l] * c[t-1][l]      (paper, equation 2; no second term in column 0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.blocks import registry
from pipeline.blocks.layers import CastTo
from pipeline.model.spec import NetworkSpec


class Residual(Protocol):
    """How a level's F and alpha become its output. An object, so that ZeRO's hooks do not walk the tensors it holds."""

    def __call__(self, f: Tensor, alpha: Tensor) -> Tensor: ...


def add_upsampled(x: Tensor, coarse: Tensor) -> Tensor:
    """``x`` (N, H, W, C) plus ``coarse`` (N, h, w, C) enlarged to its size (nearest); by broadcasting where sizes divide."""
    n, height, width, channels = x.shape
    h, w = coarse.shape[1:3]
    if height % h == 0 and width % w == 0:
        tiles = x.view(n, h, height // h, w, width // w, channels) + coarse.view(
            n, h, 1, w, 1, channels
        )
        return tiles.view(n, height, width, channels)
    enlarged = functional.interpolate(
        coarse.permute(0, 3, 1, 2), size=(height, width), mode="nearest"
    )
    return x + enlarged.permute(0, 2, 3, 1)


class Level(nn.Module):
    """Level ``level`` of column ``column``. Called in the forward pass and again by the reversible backward pass."""

    def __init__(self, spec: NetworkSpec, column: int, level: int) -> None:
        super().__init__()
        width, first, kind = spec.channels[level], column == 0, registry.kind(spec.blocks[level])
        self.cast = CastTo()
        self.down = kind.down(spec.channels[level - 1], width) if level > 0 else None
        self.up = kind.up(spec.channels[level + 1], width) if level < 3 and not first else None
        self.up_top = (
            kind.up(spec.channels[3], width) if spec.huge and level == 0 and not first else None
        )
        self.blocks = nn.ModuleList(kind.block(width) for _ in range(spec.depths[level]))
        self.alpha = nn.Parameter(torch.full((width,), 0.5))
        self.compiled = torch.compile(self.branch, dynamic=False) if spec.compile else None

    def forward(
        self,
        lower: Tensor,
        upper: Tensor | None,
        top: Tensor | None,
        keep: Tensor | None,
        residual: Residual,
    ) -> Tensor:
        """
        Args:
            lower: finer map of the same column (or the stem's output), (N, H', W', C').
            upper: coarser map of the previous column, or None.
            top: level 3 of the previous column (huge wiring, level 0 only), or None.
            keep: (blocks of this level, N) stochastic-depth factors, or None.
            residual: what to make of F and alpha.
        """
        # Without gradients (other shapes, once in a while) a graph of its own is not worth its compilation.
        branch = (
            self.compiled if self.compiled is not None and torch.is_grad_enabled() else self.branch
        )
        f = branch(lower, upper, top, keep)
        return residual(f.to(lower.dtype) if f.dtype != lower.dtype else f, self.alpha)

    def branch(
        self, lower: Tensor, upper: Tensor | None, top: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        """F: the fused inputs through the blocks, (N, H, W, C)."""
        h: Tensor = self.cast(lower)
        if self.down is not None:
            h = self.down(h)
        if self.up is not None:
            assert upper is not None
            h = add_upsampled(h, self.up(self.cast(upper)))
        if self.up_top is not None:
            assert top is not None
            h = add_upsampled(h, self.up_top(self.cast(top)))
        for i, block in enumerate(self.blocks):
            h = block(h, None if keep is None else keep[i])
        return h


def leaf(value: Tensor) -> Tensor:
    """The value as an input of a graph of its own."""
    return value.detach().requires_grad_()


@contextmanager
def buffers_restored(*modules: nn.Module) -> Iterator[None]:
    """Buffers (BatchNorm's running statistics) are afterwards what they were before: for a recompute, which runs the same
    kernels as the forward pass but must not count the batch again."""
    before = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)


@dataclass(frozen=True)
class Columns:
    """The columns of one network and the inputs of one pass through them besides the stem's output. Opaque to ZeRO's hooks."""

    levels: list[list[Level]]  # [column][level]
    huge: bool
    taps: tuple[int, ...]  # columns whose level 3 is returned, besides the last column's four maps
    keep: Tensor | None  # (columns, blocks of a column, N) stochastic-depth factors
    leaves: bool = False  # give every level inputs that are leaves of a graph of its own

    @property
    def count(self) -> int:
        return len(self.levels)

    def keep_of(self, t: int, i: int) -> Tensor | None:
        """(blocks, N) factors of one level."""
        if self.keep is None:
            return None
        begin = sum(len(level.blocks) for level in self.levels[t][:i])
        return self.keep[t, begin : begin + len(self.levels[t][i].blocks)]

    def inputs_of(
        self,
        t: int,
        i: int,
        x: Tensor,
        maps: Sequence[Tensor | None],
        previous: Sequence[Tensor | None],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(lower, upper, top) of a level: ``x`` the stem's output, ``maps`` of its column, ``previous`` column's maps."""
        lower = maps[i - 1] if i else x
        upper = previous[i + 1] if t > 0 and i < 3 else None
        top = previous[3] if t > 0 and i == 0 and self.huge else None
        assert lower is not None
        if not self.leaves:
            return lower, upper, top
        return (
            leaf(lower),
            None if upper is None else leaf(upper),
            None if top is None else leaf(top),
        )

    def run_column(
        self,
        t: int,
        x: Tensor,
        previous: Sequence[Tensor],
        residual: Callable[[int, int], Residual],
    ) -> list[Tensor]:
        """The four maps of column ``t``; ``residual``: (column, level) -> what makes the output of F and alpha."""
        maps: list[Tensor] = []
        for i, level in enumerate(self.levels[t]):
            maps.append(
                level(*self.inputs_of(t, i, x, maps, previous), self.keep_of(t, i), residual(t, i))
            )
        return maps
