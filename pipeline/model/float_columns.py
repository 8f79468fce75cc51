"""The columns in plain floating point under plain autograd: every activation stored, or a column at a time recomputed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.model.column import Columns, Residual, buffers_restored


class AlphaGradient(torch.autograd.Function):
    """F unchanged, with a gradient for alpha that is already known (zero in column 0, which has no previous column)."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, alpha: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return f.view_as(f)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], ctx.gradient, None


@dataclass
class FloatResidual:
    """F + alpha * c_prev."""

    previous: Tensor | None

    def __call__(self, f: Tensor, alpha: Tensor) -> Tensor:
        if self.previous is None:
            return cast(Tensor, AlphaGradient.apply(f, alpha, torch.zeros_like(alpha)))  # type: ignore[no-untyped-call]
        return f + alpha.to(f.dtype) * self.previous


def float_column(columns: Columns, t: int, x: Tensor, *previous: Tensor) -> list[Tensor]:
    """Column ``t`` in plain floating point."""

    def residual(t: int, i: int) -> Residual:
        return FloatResidual(previous[i] if t else None)

    return columns.run_column(t, x, previous, residual)


def run(
    columns: Columns,
    step: Callable[[int, Sequence[Tensor]], list[Tensor]],
    maps: Sequence[Tensor] = (),
    first: int = 0,
) -> tuple[Tensor, ...]:
    """Columns ``first`` .. by ``step`` (column, previous maps) -> maps: (level 3 at each tap ..., the last four maps)."""
    tapped = []
    for t in range(first, columns.count):
        maps = step(t, maps)
        if t in columns.taps:
            tapped.append(maps[3])
    return (*tapped, *maps)


def stored_columns(columns: Columns, x: Tensor) -> tuple[Tensor, ...]:
    """(level 3 at each tap ..., the last column's four maps); autograd keeps all it needs."""

    return run(columns, lambda t, previous: float_column(columns, t, x, *previous))


def checkpointed_columns(columns: Columns, x: Tensor) -> tuple[Tensor, ...]:
    """As ``stored_columns``, but only every column's maps are kept and the rest is computed again."""

    def step(t: int, previous: Sequence[Tensor]) -> list[Tensor]:
        return cast(
            list[Tensor],
            checkpoint(
                float_column,
                columns,
                t,
                x,
                *previous,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), buffers_restored(*columns.levels[t])),
            ),
        )

    return run(columns, step)
