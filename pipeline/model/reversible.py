"""The columns as one function: with stored activations, or exactly reversible with O(1) activations in columns.

The reversible backward pass makes parameter gradients by a nested ``backward`` per level, so that DeepSpeed's hooks fire
level by level (returning them as the function's outputs breaks ZeRO-3 and holds all of them under ZeRO-2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.model import stream
from pipeline.model.column import Level, inputs_of


@dataclass
class Columns:
    """The columns of one network and what one pass through them needs besides its input. Opaque to ZeRO's hooks."""

    levels: list[list[Level]]  # [column][level]
    huge: bool
    taps: tuple[int, ...]  # columns whose level 3 is returned, besides the last column's four maps
    keep: list[list[Tensor | None]]  # [column][level] stochastic-depth factors
    widths: list[list[int]] | None  # bits of the remainders; None: measured, which synchronises
    mismatched: list[Tensor] = field(default_factory=list)  # one count of wrong elements a level, filled by the backward pass


class ZeroGradient(torch.autograd.Function):
    """F unchanged, a zero gradient for alpha: column 0 has no previous column, yet its alpha is a parameter."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(alpha)
        return f.view_as(f)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.zeros_like(ctx.saved_tensors[0])


@dataclass
class Stored:
    """Plain floating-point residual."""

    previous: Tensor | None

    def __call__(self, f: Tensor, alpha: Tensor) -> Tensor:
        if self.previous is None:
            return cast(Tensor, ZeroGradient.apply(f, alpha))
        return f + alpha.to(f.dtype) * self.previous


@dataclass
class Encode:
    """Fixed-point residual of the forward pass; keeps the packed remainder."""

    previous: Tensor | None
    width: int | None
    packed: Tensor | None = None

    def __call__(self, f: Tensor, alpha: Tensor) -> Tensor:
        if self.previous is None:
            return stream.quantize(f).to(torch.int32)
        if self.width is None:
            self.width = stream.remainder_width(float(stream.split_alpha(alpha)[0].min()))
        current, remainder = stream.encode(f, self.previous, alpha)
        self.packed = stream.pack(remainder, self.width)
        return current


@dataclass
class Decode:
    """Recovers the previous column's map, and gives the differentiable output ``F + alpha * c_prev``."""

    current: Tensor
    packed: Tensor | None
    width: int | None
    previous: Tensor | None = None
    value: Tensor | None = None  # the recovered map as a float leaf
    mismatched: Tensor | None = None

    def __call__(self, f: Tensor, alpha: Tensor) -> Tensor:
        if self.packed is None:
            self.mismatched = (self.current != stream.quantize(f.detach()).to(torch.int32)).sum()
            return cast(Tensor, ZeroGradient.apply(f, alpha))
        assert self.width is not None
        with torch.no_grad():
            remainder = stream.unpack(self.packed, self.width, self.current.shape)
            self.previous = stream.decode(f, self.current, remainder, alpha)
            magnitude, sign = stream.split_alpha(alpha)
            rounding = (magnitude * sign).to(f.dtype) - alpha.to(f.dtype)
        self.value = stream.to_float(self.previous, f.dtype).requires_grad_()
        return f + (alpha.to(f.dtype) + rounding) * self.value


def stored_columns(columns: Columns, x: Tensor) -> tuple[Tensor, ...]:
    """All columns under plain autograd: (level 3 at each tap ..., the last column's four maps)."""
    previous: list[Tensor] | None = None
    tapped = []
    for t, levels in enumerate(columns.levels):
        maps: list[Tensor] = []
        for i, level in enumerate(levels):
            residual = Stored(previous[i] if previous is not None else None)
            maps.append(level(*inputs_of(i, x, maps, previous, columns.huge), columns.keep[t][i], residual))
        previous = maps
        if t in columns.taps:
            tapped.append(maps[3])
    assert previous is not None
    return (*tapped, *previous)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


class ExactColumns(torch.autograd.Function):
    """All columns as one function that keeps only the stem's output, the last column and the packed remainders."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: Columns) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        integers: list[Tensor] | None = None
        previous: list[Tensor] | None = None
        tapped: list[Tensor] = []
        kept: list[list[tuple[Tensor | None, int | None]]] = []
        for t, levels in enumerate(columns.levels):
            now: list[Tensor] = []
            maps: list[Tensor] = []
            kept.append([])
            for i, level in enumerate(levels):
                width = None if columns.widths is None else columns.widths[t][i]
                encode = Encode(integers[i] if integers is not None else None, width)
                now.append(level(*inputs_of(i, x, maps, previous, columns.huge), columns.keep[t][i], encode))
                maps.append(stream.to_float(now[i], x.dtype))
                kept[t].append((encode.packed, encode.width))
            integers, previous = now, maps
            if t in columns.taps:
                tapped.append(maps[3])
        assert integers is not None and previous is not None
        ctx.columns, ctx.x, ctx.integers, ctx.kept = columns, x.detach(), integers, kept
        ctx.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        return (*tapped, *previous)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        columns, integers, kept = ctx.columns, ctx.integers, ctx.kept
        ctx.integers = ctx.kept = None
        at_tap = dict(zip(columns.taps, gradients[: len(columns.taps)], strict=True))
        outgoing: list[Tensor | None] = list(gradients[len(columns.taps) :])
        x_gradient: Tensor | None = None
        enabled, dtype = ctx.autocast
        with torch.autocast(ctx.x.device.type, dtype, enabled=enabled):
            for t in reversed(range(len(columns.levels))):
                outgoing[3] = _add(outgoing[3], at_tap.get(t))
                integers, outgoing, from_column = _column_backward(columns, t, ctx.x, integers, kept.pop(), outgoing)
                x_gradient = _add(x_gradient, from_column)
        return x_gradient, None


def _column_backward(
    columns: Columns,
    t: int,
    x: Tensor,
    integers: list[Tensor],
    kept: Sequence[tuple[Tensor | None, int | None]],
    outgoing: list[Tensor | None],
) -> tuple[list[Tensor], list[Tensor | None], Tensor | None]:
    """Inverts column ``t`` and sends gradients through it, from level 3 down to 0: (c[t-1], its gradients, the stem's)."""
    first = t == 0
    recovered: list[Tensor] = [torch.empty(0)] * 4
    values: list[Tensor] = [torch.empty(0)] * 4
    gradients: list[Tensor | None] = [None] * 4
    x_gradient: Tensor | None = None
    for i in (3, 2, 1, 0):
        lower = (stream.to_float(integers[i - 1], x.dtype) if i else x.detach()).requires_grad_()
        upper = values[i + 1].detach().requires_grad_() if not first and i < 3 else None
        top = values[3].detach().requires_grad_() if not first and i == 0 and columns.huge else None
        decode = Decode(integers[i], *kept[i])
        with torch.enable_grad():
            output = columns.levels[t][i](lower, upper, top, columns.keep[t][i], decode)
        upstream = outgoing[i]
        torch.autograd.backward(output, torch.zeros_like(output) if upstream is None else upstream)
        outgoing[i] = None
        if decode.mismatched is not None:
            columns.mismatched.append(decode.mismatched)
        if decode.previous is not None and decode.value is not None:
            recovered[i], values[i] = decode.previous, decode.value
            gradients[i] = _add(gradients[i], decode.value.grad)
        if i:
            outgoing[i - 1] = _add(outgoing[i - 1], lower.grad)
        else:
            x_gradient = lower.grad
        if upper is not None:
            gradients[i + 1] = _add(gradients[i + 1], upper.grad)
        if top is not None:
            gradients[3] = _add(gradients[3], top.grad)
    return recovered, gradients, x_gradient
