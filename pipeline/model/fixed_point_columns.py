"""Columns on the fixed-point stream: the forward pass, with or without autograd.

``FixedPointStream`` is the state of a forward pass. It holds the four int32 maps of one column and
moves them from column to column in place:

    column 0   start:            stream = quantize(F)
    column t   encode (or add):  stream = quantize(F) + alpha * stream, remainder to ``remainders``

Under plain autograd (``StraightThrough``) gradients pass the rounding as if it were not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pipeline.model import fixed_point
from pipeline.model.column import Columns, Residual
from pipeline.model.consistency import Consistency
from pipeline.model.fixed_point import GridAlpha, Resolution
from pipeline.model.level_tensors import refuse_create_graph
from pipeline.model.stream_kernels import StreamKernels


@dataclass(kw_only=True)
class ExactContext:
    """Settings of one pass through exact columns, and its consistency record.

    An object and not a tuple, so that ZeRO's hooks do not walk through its tensors.
    """

    kernels: StreamKernels
    consistency: Consistency
    resolution: Resolution
    # [column][level] bits per remainder. None: read alpha in the forward pass, which synchronises.
    remainder_widths: list[list[int]] | None
    # Make the gradients non-finite after an overflow, or if elements differ, so that an engine that
    # skips steps with such gradients skips this one.
    skip_on_overflow: bool
    skip_on_mismatch: bool
    # Levels are compiled. The forward pass must then run the same graph as the recompute.
    compiled: bool

    def nonfinite_flag(self) -> Tensor:
        """Return inf if the engine must skip the step, else 0. Does not wait for the device."""
        return self.consistency.nonfinite_flag(
            overflows=self.skip_on_overflow, mismatches=self.skip_on_mismatch
        )


@dataclass(kw_only=True)
class FixedPointStream:
    """Four int32 maps, moved from column to column in place, with what each column records."""

    exact: ExactContext
    invertible: bool  # keep remainders and checksums, so that the columns can be inverted
    maps: list[Tensor] = field(default_factory=list)  # (positions, channels) each
    # One item per level, from column 1 on (column 0 has no remainder): packed, and their bits.
    remainders: list[Tensor] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    remainder_overflow: list[Tensor] = field(default_factory=list)  # bool scalars
    # One item per level, from the first column that ran on.
    checksums: list[Tensor] = field(default_factory=list)
    extremes: list[Tensor] = field(default_factory=list)  # (2,): smallest and largest value

    @torch.no_grad()
    def advance(self, t: int, i: int, f: Tensor, alpha: Tensor) -> Tensor:
        """Move level ``i`` of the stream to column ``t``. Returns its value in F's dtype."""
        flat = f.detach().flatten(0, -2)
        if t == 0:
            current, value = self.exact.kernels.start(flat, self.exact.resolution)
            self.maps.append(current)
        elif self.invertible:
            value = self._encode(t, i, flat, fixed_point.grid_alpha(alpha))
        else:
            grid_alpha = fixed_point.grid_alpha(alpha)
            value = self.exact.kernels.add(flat, self.maps[i], grid_alpha, self.exact.resolution)
        self.extremes.append(torch.stack(torch.aminmax(value)))
        if self.invertible:
            self.checksums.append(fixed_point.checksum(self.maps[i]))
        # Not a view: autograd would refuse in-place operations on a map that the caller receives.
        return cast(Tensor, torch.ops.aten._unsafe_view(value, f.shape))

    def _encode(self, t: int, i: int, flat: Tensor, alpha: GridAlpha) -> Tensor:
        if self.exact.remainder_widths:
            width = self.exact.remainder_widths[t][i]
        else:
            width = fixed_point.remainder_width(float(alpha.magnitude.min()))
        value, remainder = self.exact.kernels.encode(
            flat, self.maps[i], alpha, self.exact.resolution, fixed_point.remainder_dtype(width)
        )
        self.remainders.append(fixed_point.pack(remainder, width))
        self.widths.append(width)
        # ``width`` bits hold the remainders of |alpha| >= 2**-width. The width was chosen before
        # this step, so check on the device that alpha has not become smaller since.
        self.remainder_overflow.append(alpha.magnitude.min() < 2.0**-width)
        return value

    def record_consistency(self, first: int) -> None:
        """Write the extremes and overflows seen from column ``first`` on to the record."""
        consistency = self.exact.consistency
        last = first + len(self.extremes) // 4
        consistency.max_abs[first:last] = torch.stack(self.extremes).abs().amax(1).view(-1, 4)
        if self.remainder_overflow:
            overflow = torch.stack(self.remainder_overflow).view(-1, 4)
            consistency.remainder_overflow[1:last] = overflow


class StraightThroughContext(FunctionCtx):
    """What ``StraightThrough`` saves for its backward pass."""

    saved_tensors: tuple[Tensor, Tensor | None]
    alpha_dtype: torch.dtype


class StraightThrough(torch.autograd.Function):
    """A level's output on the stream, with the gradients of F + alpha * c_prev."""

    @staticmethod
    def forward(
        ctx: StraightThroughContext,
        f: Tensor,
        alpha: Tensor,
        previous: Tensor | None,
        advance: Residual,
    ) -> Tensor:
        magnitude, sign = fixed_point.grid_alpha(alpha)
        signed_alpha = (magnitude * sign).to(f.dtype)
        ctx.save_for_backward(signed_alpha, previous)  # type: ignore[arg-type]  # None is allowed
        ctx.alpha_dtype = alpha.dtype
        return advance(f, alpha)

    @staticmethod
    def backward(
        ctx: StraightThroughContext, *gradients: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, None]:
        refuse_create_graph()
        gradient = gradients[0]
        alpha, previous = ctx.saved_tensors
        if previous is None:  # column 0: alpha has no effect
            return gradient, torch.zeros_like(alpha, dtype=ctx.alpha_dtype), None, None
        for_alpha = alpha_gradient(gradient, previous).to(ctx.alpha_dtype)
        return gradient, for_alpha, gradient * alpha, None


def alpha_gradient(gradient: Tensor, previous: Tensor) -> Tensor:
    """Return the gradient of alpha (C,): the sum of ``gradient`` * c_prev per channel."""
    return (gradient * previous).flatten(0, -2).sum(0)


@dataclass
class FixedPointResidual:
    """The residual of a level on the stream, under autograd."""

    previous: Tensor | None  # c_prev; None in column 0
    advance: Residual

    def __call__(self, f: Tensor, alpha: Tensor) -> Tensor:
        output = StraightThrough.apply(f, alpha, self.previous, self.advance)  # type: ignore[no-untyped-call]
        return cast(Tensor, output)


def fixed_point_column(
    columns: Columns, x: Tensor, stream: FixedPointStream, t: int, previous: Sequence[Tensor]
) -> list[Tensor]:
    """Run column ``t`` on the stream. Autograd stores its activations if gradients are on."""

    def residual(t: int, i: int) -> Residual:
        return FixedPointResidual(previous[i] if t else None, partial(stream.advance, t, i))

    return columns.run_column(t, x, previous, residual)
