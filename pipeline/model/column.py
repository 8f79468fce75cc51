"""One level of one column: the fusion of its inputs, its blocks, and the scaled residual.

    c[t][l] = F[t][l](lower, upper) + alpha[t][l] * c[t-1][l]

(paper, equation 2; column 0 has no second term). In code, ``t`` is the column and ``i`` the level.
The inputs of F, for a network with four levels (0 is the finest):

    lower   c[t][i-1], the finer map of the same column; for level 0 the stem's output
    upper   c[t-1][i+1], the coarser map of the previous column; None for level 3 and column 0
    top     c[t-1][3], for level 0 with the huge wiring only

The residual makes columns invertible: given all maps of column t, level 3 of column t-1 follows
from c[t][3], F (which reads c[t][2] only) and alpha. Then level 2 follows, whose F reads c[t-1][3],
and so on down to level 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.blocks import registry
from pipeline.blocks.layers import CastTo
from pipeline.model.compiled_level import CompiledLevel
from pipeline.model.spec import NetworkSpec
from pipeline.model.tracing import tracing


class Residual(Protocol):
    """Computes a level's output from F and alpha.

    Implementations are objects, not tuples of tensors: ZeRO's module hooks walk through tuples and
    lists of arguments, and must not touch the tensors that a residual holds.
    """

    def __call__(self, f: Tensor, alpha: Tensor) -> Tensor: ...


class LevelInputs(NamedTuple):
    """Inputs of F of one level, each (N, H, W, C). See the top of this module."""

    lower: Tensor
    upper: Tensor | None
    top: Tensor | None

    def as_leaves(self) -> LevelInputs:
        """Return the inputs of a graph of its own: gradients stop there."""
        return LevelInputs(
            as_leaf(self.lower),
            None if self.upper is None else as_leaf(self.upper),
            None if self.top is None else as_leaf(self.top),
        )


def add_upsampled(x: Tensor, coarse: Tensor, symbolic: bool = False) -> Tensor:
    """Return ``x`` (N, H, W, C) plus ``coarse`` (N, h, w, C), upsampled to its size (nearest).

    ``symbolic``: the sizes may be symbols, of a program for any size. Their products and quotients
    would grow from level to level until the compiler does not end, so none are taken.
    """
    n, height, width, channels = x.shape
    h, w = coarse.shape[1:3]
    if not symbolic and height % h == 0 and width % w == 0:
        # Broadcast instead of materialising the upsampled map. Example: an 8x8 map seen as 4x2x4x2
        # plus a 4x4 map seen as 4x1x4x1.
        tiles = x.view((n, h, height // h, w, width // w, channels))
        tiles = tiles + coarse.view((n, h, 1, w, 1, channels))
        return tiles.view(n, height, width, channels)
    upsampled = functional.interpolate(
        coarse.permute(0, 3, 1, 2), size=(height, width), mode="nearest"
    )
    return x + upsampled.permute(0, 2, 3, 1)


class Level(nn.Module):
    """Level ``level`` of column ``column``. The reversible backward pass calls it a second time."""

    def __init__(self, spec: NetworkSpec, column: int, level: int) -> None:
        super().__init__()
        channels = spec.channels
        kind = registry.kind(spec.blocks[level])
        has_upper = column > 0 and level < 3
        has_top = column > 0 and level == 0 and spec.huge
        self.cast = CastTo()
        self.down = kind.down(channels[level - 1], channels[level]) if level > 0 else None
        self.up = kind.up(channels[level + 1], channels[level]) if has_upper else None
        self.up_top = kind.up(channels[3], channels[level]) if has_top else None
        self.blocks = nn.ModuleList(kind.block(channels[level]) for _ in range(spec.depths[level]))
        # Also in column 0, where it has no effect: all columns then have the same parameters, as in
        # the published code.
        self.alpha = nn.Parameter(torch.full((channels[level],), 0.5))
        self.compiled = CompiledLevel(self.branch) if spec.compile else None
        self.fixed_sizes = spec.compile  # its own graph has no symbols for sizes

    def forward(
        self,
        lower: Tensor,
        upper: Tensor | None,
        top: Tensor | None,
        drop_path_scale: Tensor | None,
        residual: Residual,
    ) -> Tensor:
        """Return the level's output (N, H, W, C): ``residual`` of F and alpha.

        Args:
            lower, upper, top: inputs of F; see the top of this module.
            drop_path_scale: (blocks of this level, N) stochastic-depth factors, or None.
            residual: computes the output from F and alpha.
        """
        # Evaluation (without gradients) is rare and has other shapes, so it is not worth another
        # compilation. A program that is compiled or traced as a whole contains the level anyway.
        use_compiled = torch.is_grad_enabled() and not tracing()
        compiled = self.compiled if use_compiled else None
        branch = self.branch if compiled is None else compiled
        f = branch(lower, upper, top, drop_path_scale)
        # Under autocast F is narrower than the maps. Widen it before it is quantised or added.
        return residual(f.to(lower.dtype) if f.dtype != lower.dtype else f, self.alpha)

    def branch(
        self,
        lower: Tensor,
        upper: Tensor | None,
        top: Tensor | None,
        drop_path_scale: Tensor | None,
    ) -> Tensor:
        """Compute F, (N, H, W, C): fuse the inputs, then run the blocks."""
        symbolic = tracing() and not self.fixed_sizes
        h: Tensor = self.cast(lower)
        if self.down is not None:
            h = self.down(h)
        if self.up is not None:
            assert upper is not None
            h = add_upsampled(h, self.up(self.cast(upper)), symbolic)
        if self.up_top is not None:
            assert top is not None
            h = add_upsampled(h, self.up_top(self.cast(top)), symbolic)
        for i, block in enumerate(self.blocks):
            h = block(h, None if drop_path_scale is None else drop_path_scale[i])
        return h


def as_leaf(value: Tensor) -> Tensor:
    """Return the value as a leaf: the input of a graph of its own, with a gradient."""
    return value.detach().requires_grad_()


@contextmanager
def buffers_restored(*modules: nn.Module) -> Iterator[None]:
    """Restore all buffers of ``modules`` on exit.

    For a recompute: it runs the same kernels as the forward pass, but BatchNorm must not count the
    batch a second time in its running statistics.
    """
    saved = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in saved:
            buffer.data.copy_(value)


@contextmanager
def same_convolution_algorithms() -> Iterator[None]:
    """Keep cuDNN from choosing algorithms by measurement (``torch.backends.cudnn.benchmark``).

    PyTorch keeps measured choices per thread, and autograd runs the backward pass in a thread of
    its own: the recompute could take another algorithm than the forward pass, with other bits.
    Without measurement, cuDNN's heuristic gives one algorithm per shape in every thread.
    """
    chosen = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = chosen


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of one network and the settings of one pass through them.

    An object and not a tuple, so that ZeRO's hooks do not walk through the modules and tensors.
    """

    levels: list[list[Level]]  # [column][level]
    huge: bool
    taps: tuple[int, ...]  # columns whose level 3 is returned, besides the last column's four maps
    drop_path_scales: Tensor | None  # (columns, blocks of a column, N)

    @property
    def count(self) -> int:
        return len(self.levels)

    def drop_path_scale(self, t: int, i: int) -> Tensor | None:
        """Return the (blocks, N) factors of one level, or None without stochastic depth."""
        if self.drop_path_scales is None:
            return None
        begin = sum(len(level.blocks) for level in self.levels[t][:i])
        return self.drop_path_scales[t, begin : begin + len(self.levels[t][i].blocks)]

    def inputs_of(
        self,
        t: int,
        i: int,
        x: Tensor,
        maps: Sequence[Tensor | None],
        previous: Sequence[Tensor | None],
    ) -> LevelInputs:
        """Return the inputs of F of a level.

        Args:
            t, i: column and level.
            x: the stem's output.
            maps: the maps of column ``t``; level ``i - 1`` must be there.
            previous: the maps of column ``t - 1``; level ``i + 1`` (and 3) must be there.
        """
        lower = maps[i - 1] if i else x
        upper = previous[i + 1] if t > 0 and i < 3 else None
        top = previous[3] if t > 0 and i == 0 and self.huge else None
        assert lower is not None
        return LevelInputs(lower, upper, top)

    def run_column(
        self,
        t: int,
        x: Tensor,
        previous: Sequence[Tensor],
        residual: Callable[[int, int], Residual],
    ) -> list[Tensor]:
        """Return the four maps of column ``t``. ``residual``: (column, level) -> its residual."""
        maps: list[Tensor] = []
        for i, level in enumerate(self.levels[t]):
            inputs = self.inputs_of(t, i, x, maps, previous)
            maps.append(level(*inputs, self.drop_path_scale(t, i), residual(t, i)))
        return maps
