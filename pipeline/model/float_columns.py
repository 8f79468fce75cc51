"""Columns in plain floating point under plain autograd: activations stored or checkpointed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

from pipeline.model.column import Columns, Residual, buffers_restored


class AlphaGradientContext(FunctionCtx):
    """What ``AlphaGradient`` saves for its backward pass."""

    saved_tensors: tuple[Tensor]


class AlphaGradient(torch.autograd.Function):
    """Returns F unchanged and gives alpha a gradient that the caller already knows.

    Used where the output of a level does not depend on alpha through autograd: in the recompute of
    the reversible backward pass, and in column 0, whose alpha must still get a gradient (zero).
    """

    # With setup_context, torch.func can transform networks that contain this function.
    generate_vmap_rule = True

    @staticmethod
    def forward(f: Tensor, alpha: Tensor, gradient: Tensor) -> Tensor:
        return f.view_as(f)

    @staticmethod
    def setup_context(
        ctx: AlphaGradientContext, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor
    ) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: AlphaGradientContext, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], ctx.saved_tensors[0], None


@dataclass
class FloatResidual:
    """F + alpha * c_prev in floating point."""

    previous: Tensor | None  # c_prev; None in column 0

    def __call__(self, f: Tensor, alpha: Tensor) -> Tensor:
        if self.previous is None:
            zero = torch.zeros_like(alpha)
            return cast(Tensor, AlphaGradient.apply(f, alpha, zero))  # type: ignore[no-untyped-call]
        return f + alpha.to(f.dtype) * self.previous


def float_column(columns: Columns, t: int, x: Tensor, *previous: Tensor) -> list[Tensor]:
    """Return the four maps of column ``t``, in floating point."""

    def residual(t: int, i: int) -> Residual:
        return FloatResidual(previous[i] if t else None)

    return columns.run_column(t, x, previous, residual)


def run_columns(
    columns: Columns,
    column_fn: Callable[[int, Sequence[Tensor]], list[Tensor]],
    maps: Sequence[Tensor] = (),
    first: int = 0,
) -> tuple[Tensor, ...]:
    """Run columns ``first`` to the last.

    Args:
        columns: of the network.
        column_fn: (column, maps of the column before it) -> its four maps.
        maps: maps of column ``first - 1``; empty for column 0.
        first: first column to run.

    Returns:
        Level 3 of each tap, then the last column's four maps.
    """
    tapped = []
    for t in range(first, columns.count):
        maps = column_fn(t, maps)
        if t in columns.taps:  # a head reads this column
            tapped.append(maps[3])
    return (*tapped, *maps)


def stored_columns(columns: Columns, x: Tensor) -> tuple[Tensor, ...]:
    """Run all columns with stored activations. Returns what ``run_columns`` returns."""

    return run_columns(columns, lambda t, previous: float_column(columns, t, x, *previous))


def checkpointed_columns(columns: Columns, x: Tensor) -> tuple[Tensor, ...]:
    """Run all columns with activation checkpointing: only each column's maps are stored."""

    def column_fn(t: int, previous: Sequence[Tensor]) -> list[Tensor]:
        maps = checkpoint(
            float_column,
            columns,
            t,
            x,
            *previous,
            use_reentrant=False,
            # Columns draw no random numbers: the drop path scales are an input.
            preserve_rng_state=False,
            # (context of the forward pass, context of the recompute)
            context_fn=lambda: (nullcontext(), buffers_restored(*columns.levels[t])),
        )
        return cast(list[Tensor], maps)

    return run_columns(columns, column_fn)
