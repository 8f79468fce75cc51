"""Exactly reversible columns: one function over all of them that keeps the last column and the packed remainders.

Its backward pass makes parameter gradients by a nested ``backward`` per level, so that DeepSpeed's hooks fire level by
level (returning them as the function's outputs breaks ZeRO-3 and holds all of them under ZeRO-2), and each level's graph is
freed as it goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.model import fixed_point
from pipeline.model.column import Columns, Residual, buffers_restored, leaf
from pipeline.model.fixed_point_columns import Exactness, Stream, alpha_gradient, fixed_column
from pipeline.model.float_columns import AlphaGradient, run


def exact_columns(columns: Columns, x: Tensor, exact: Exactness, stored: int) -> tuple[Tensor, ...]:
    """(level 3 at each tap ..., the last column's four maps); the last ``stored`` columns keep their graphs."""
    trained = any(
        p.requires_grad for levels in columns.levels for level in levels for p in level.parameters()
    )
    tail = Stream(exact, keeping=False)
    if not torch.is_grad_enabled() or not (x.requires_grad or trained):
        with torch.no_grad():
            outputs = run(columns, partial(fixed_column, columns, x, tail))
        tail.note(0)
        return outputs
    x, first = (
        x if x.requires_grad else leaf(x),
        columns.count - stored,
    )  # x is a leaf where the stem is frozen
    head: tuple[Tensor, ...] = ()
    if first:
        taps = tuple(t for t in columns.taps if t < first)
        inverted = replace(columns, levels=columns.levels[:first], taps=taps, leaves=exact.compiled)
        passed = x, inverted, exact, tail if stored else None
        head = cast(tuple[Tensor, ...], ExactColumns.apply(*passed))  # type: ignore[no-untyped-call]
    if not stored:
        return head
    outputs = run(columns, partial(fixed_column, columns, x, tail), head[-4:], first)
    tail.note(first)
    return (*head[:-4], *outputs)


def autocast_of(device_type: str, state: tuple[bool, torch.dtype]) -> torch.autocast:
    """Autocast (on, dtype) without its cache: a level uses a weight once, and the cache would hold copies of them all."""
    return torch.autocast(device_type, dtype=state[1], enabled=state[0], cache_enabled=False)


class ExactColumns(torch.autograd.Function):
    """The columns as one function. Kept: the stem's output, the last column of the stream, the packed remainders."""

    clear_saved_tensors_on_access = True

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, columns: Columns, exact: Exactness, tail: Stream | None
    ) -> tuple[Tensor, ...]:
        """``tail``: a stream that is to go on from the last column."""
        ctx.set_materialize_grads(False)
        through, device = Stream(exact, keeping=True), x.device.type

        def column(t: int, previous: Sequence[Tensor]) -> list[Tensor]:
            def residual(t: int, i: int) -> Residual:
                return partial(through.advance, t, i)

            return columns.run_column(t, x, previous, residual)

        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        with autocast_of(device, ctx.autocast), torch.set_grad_enabled(exact.compiled):
            outputs = run(columns, column)
        through.note(0)
        if tail is not None:
            tail.maps = [current.clone() for current in through.maps]
        ctx.columns, ctx.exact, ctx.widths = columns, exact, through.widths
        ctx.shapes = [value.shape for value in outputs[-4:]]
        ctx.fingerprints = torch.stack(through.fingerprints).view(-1, 4)
        ctx.kept_fingerprints = torch.stack(
            [fixed_point.fingerprint(v) for v in (x, columns.keep) if v is not None]
        )
        ctx.save_for_backward(x, *through.maps, *through.remainders)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        x, *kept = ctx.saved_tensors
        columns: Columns = replace(ctx.columns, leaves=True)
        inversion = Inversion(
            columns,
            x.detach(),
            ctx.exact,
            kept[:4],
            kept[4:],
            ctx.widths,
            ctx.shapes,
            ctx.fingerprints,
        )
        del kept
        inversion.begin(ctx.kept_fingerprints)
        outgoing = list(gradients[len(columns.taps) :])
        tapped = dict(zip(columns.taps, gradients, strict=False))
        if columns.count - 1 in tapped:
            outgoing[3] = _add(tapped[columns.count - 1], outgoing[3])
        with autocast_of(x.device.type, ctx.autocast):
            for t in reversed(range(columns.count)):
                outgoing = inversion.column(t, outgoing, tapped.get(t - 1))
        return inversion.x_gradient, None, None, None


@dataclass
class Inversion:
    """The way back through the columns. Sums are made in the order of plain autograd, so that rounding is the same."""

    columns: Columns
    x: Tensor
    exact: Exactness
    maps: list[Tensor]  # the stream, moved back in place
    remainders: list[Tensor]
    widths: list[int]
    shapes: list[torch.Size]  # of the four maps, (N, H, W, C)
    fingerprints: Tensor  # (columns, 4), of the forward pass
    x_gradient: Tensor | None = None

    values: list[Tensor | None] = field(
        default_factory=list
    )  # of the column being inverted, until no longer needed
    before: list[Tensor | None] = field(
        default_factory=list
    )  # of the column before it, as far as recovered
    share: Tensor | None = None  # of the upstream gradient that goes to the recovered map

    def begin(self, kept_fingerprints: Tensor) -> None:
        """Count what changed since the forward pass, and make the last column's values (level 3's is not needed)."""
        health, keep, step = self.exact.consistency, self.columns.keep, self.exact.units[1]
        found = [fixed_point.fingerprint(kept) for kept in (*self.maps, self.x)]
        health.saved_tensor_changed[:5] += torch.stack(found) != torch.cat(
            [self.fingerprints[-1], kept_fingerprints[:1]]
        )
        if keep is not None:
            health.saved_tensor_changed[6] += fixed_point.fingerprint(keep) != kept_fingerprints[1]
        pairs = zip(self.maps[:3], self.shapes, strict=False)
        floats = [
            m.to(self.x.dtype).mul_(step).view(shape) for m, shape in pairs
        ]  # a power of two: rounded once, too
        self.values, self.before = [*floats, None], [None] * 4

    def column(
        self, t: int, outgoing: list[Tensor | None], tapped: Tensor | None
    ) -> list[Tensor | None]:
        """Invert column ``t`` and send ``outgoing`` through it -> the gradients of column t - 1. ``tapped``: its tap's."""
        incoming: list[Tensor | None] = [None, None, None, tapped]
        for i in (3, 2, 1, 0):
            level, upstream = self.columns.levels[t][i], outgoing[i]
            outgoing[i] = None
            if upstream is None:
                upstream = self.x.new_zeros(self.shapes[i])
            lower, upper, top = self.columns.inputs_of(t, i, self.x, self.values, self.before)
            self.values[i] = None
            upstream = upstream.contiguous()
            with buffers_restored(level):
                with torch.enable_grad():
                    keep, recover = (
                        self.columns.keep_of(t, i),
                        partial(self.recover, t, i, upstream),
                    )
                    output = level(lower, upper, top, keep, recover)
                if t == i == 0:
                    upstream = upstream + self.exact.consistency.nonfinite_flag(
                        self.exact.skip_on_mismatch
                    ).to(upstream.dtype)
                torch.autograd.backward(output, upstream)
            del output, upstream, recover
            incoming[i], self.share = _add(incoming[i], self.share), None
            if i:
                outgoing[i - 1] = _add(
                    outgoing[i - 1], lower.grad, owned=t < self.columns.count - 1
                )
            else:
                self.x_gradient = _add(self.x_gradient, lower.grad, owned=True)
            if upper is not None:
                incoming[i + 1] = _add(incoming[i + 1], upper.grad, owned=True)
            if top is not None:
                incoming[3] = _add(incoming[3], top.grad, owned=True)
        self.values, self.before = self.before, [None] * 4
        return incoming

    def recover(self, t: int, i: int, upstream: Tensor, f: Tensor, alpha: Tensor) -> Tensor:
        """The residual of the way back: level ``i`` of the stream to column t - 1, and F with a gradient for alpha."""
        passes, flat, current = self.exact.passes, f.detach().flatten(0, -2), self.maps[i]
        with torch.no_grad():
            if t == 0:
                wrong, gradient = (
                    passes.check(flat, current, self.exact.units[0]).count_nonzero(),
                    torch.zeros_like(alpha),
                )
            else:
                remainder = fixed_point.unpack(
                    self.remainders.pop(), self.widths.pop(), current.shape
                )
                value, share, differs = passes.decode(
                    flat,
                    current,
                    remainder,
                    *fixed_point.split_alpha(alpha),
                    upstream.flatten(0, -2),
                    *self.exact.units,
                )
                wrong = differs.count_nonzero() + (
                    fixed_point.fingerprint(current) != self.fingerprints[t - 1, i]
                )
                self.before[i], self.share = value.view(f.shape), share.view(f.shape)
                gradient = alpha_gradient(upstream, value.view(f.shape)).to(alpha.dtype)
            self.exact.consistency.mismatched[t, i] += wrong
        return cast(Tensor, AlphaGradient.apply(f, alpha, gradient))  # type: ignore[no-untyped-call]


def _add(a: Tensor | None, b: Tensor | None, owned: bool = False) -> Tensor | None:
    """a + b, either of which may be missing; in place where ``a`` was made here."""
    if a is None or b is None:
        return a if b is None else b
    return a.add_(b) if owned else a + b
