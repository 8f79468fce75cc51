"""The columns on the fixed-point stream: the forward pass, alone or under plain autograd with straight-through gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.model import fixed_point
from pipeline.model.column import Columns, Residual
from pipeline.model.consistency import Consistency
from pipeline.model.stream_kernels import StreamKernels


@dataclass
class Exactness:
    """What exact columns need besides the columns. Opaque to ZeRO's hooks."""

    passes: StreamKernels
    consistency: Consistency
    units: tuple[Tensor, Tensor]  # of the stream, as ``fixed_point.units_of`` makes them
    widths: (
        list[list[int]] | None
    )  # [column][level], bits of the remainders; None: measured, which synchronises
    skip_on_mismatch: bool  # make the gradients non-finite where elements differ
    compiled: bool  # levels are compiled: the forward pass must run the graph of the recompute


@dataclass
class Stream:
    """The four int32 maps, moved from column to column in place, and what is noted on the way."""

    exact: Exactness
    keeping: bool  # whether the remainders are kept, so that the way can be gone back
    maps: list[Tensor] = field(default_factory=list)  # (positions, channels) each
    remainders: list[Tensor] = field(default_factory=list)  # packed, four a column from column 1 on
    widths: list[int] = field(default_factory=list)  # of the remainders, bits
    fingerprints: list[Tensor] = field(default_factory=list)  # four a column, as the next two
    extremes: list[Tensor] = field(default_factory=list)  # smallest, largest value
    remainder_overflow: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def advance(self, t: int, i: int, f: Tensor, alpha: Tensor) -> Tensor:
        """Level ``i`` of the stream to column ``t``; its value in F's dtype."""
        passes, units, flat = self.exact.passes, self.exact.units, f.detach().flatten(0, -2)
        if t == 0:
            current, value = passes.start(flat, *units)
            self.maps.append(current)
        elif not self.keeping:
            value = passes.add(flat, self.maps[i], *fixed_point.split_alpha(alpha), *units)
        else:
            magnitude, sign = fixed_point.split_alpha(alpha)
            width = (
                self.exact.widths[t][i]
                if self.exact.widths
                else fixed_point.remainder_width(float(magnitude.min()))
            )
            dtype = fixed_point.remainder_dtype(width)
            value, remainder = passes.encode(flat, self.maps[i], magnitude, sign, *units, dtype)
            self.remainders.append(fixed_point.pack(remainder, width))
            self.widths.append(width)
            self.remainder_overflow.append(magnitude.min() < 2.0**-width)
        self.extremes.append(torch.stack(torch.aminmax(value)))
        if self.keeping:
            self.fingerprints.append(fixed_point.fingerprint(self.maps[i]))
        return value.view(f.shape)

    def note(self, first: int) -> None:
        """To the health: what was seen from column ``first`` on."""
        health, last = self.exact.consistency, first + len(self.extremes) // 4
        health.max_abs[first:last] = torch.stack(self.extremes).abs().amax(1).view(-1, 4)
        if self.remainder_overflow:
            health.remainder_overflow[1:last] = torch.stack(self.remainder_overflow).view(-1, 4)


class StraightThrough(torch.autograd.Function):
    """A level's output on the stream, with the gradients of F + alpha * c_prev."""

    @staticmethod
    def forward(
        ctx: Any, f: Tensor, alpha: Tensor, previous: Tensor | None, advance: Residual
    ) -> Tensor:
        magnitude, sign = fixed_point.split_alpha(alpha)
        ctx.save_for_backward((magnitude * sign).to(f.dtype), previous)
        ctx.alpha_dtype = alpha.dtype
        return advance(f, alpha)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        gradient, (alpha, previous) = gradients[0], ctx.saved_tensors
        if previous is None:
            return gradient, torch.zeros_like(alpha, dtype=ctx.alpha_dtype), None, None
        return (
            gradient,
            alpha_gradient(gradient, previous).to(ctx.alpha_dtype),
            gradient * alpha,
            None,
        )


def alpha_gradient(gradient: Tensor, previous: Tensor) -> Tensor:
    """sum of gradient * c_prev over all but the channels."""
    return (gradient * previous).flatten(0, -2).sum(0)


@dataclass
class FixedResidual:
    """The stream's residual under autograd."""

    previous: Tensor | None
    advance: Residual

    def __call__(self, f: Tensor, alpha: Tensor) -> Tensor:
        return cast(Tensor, StraightThrough.apply(f, alpha, self.previous, self.advance))  # type: ignore[no-untyped-call]


def fixed_column(
    columns: Columns, x: Tensor, through: Stream, t: int, previous: Sequence[Tensor]
) -> list[Tensor]:
    """Column ``t`` on the stream; every activation is kept if gradients are wanted."""

    def residual(t: int, i: int) -> Residual:
        return FixedResidual(previous[i] if t else None, partial(through.advance, t, i))

    return columns.run_column(t, x, previous, residual)
