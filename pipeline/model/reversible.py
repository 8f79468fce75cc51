"""Exactly reversible columns: one autograd function that recovers its activations.

The forward pass saves the stem's output, the last column's integer maps and the packed remainders
(one bit per element of every column at the initial alpha = 0.5). The backward pass recovers the
columns from the last to the first, and in each column the levels from the coarsest to the finest.
Steps for level i of column t:

1. Take the inputs of F: ``lower`` from column t, ``upper`` and ``top`` from column t - 1. All are
   known, because coarser levels of column t - 1 were recovered first.
2. Recompute F under autograd. The level ends in ``_recover``, which
   a. subtracts quantize(F) from the stream and divides by alpha: the stream's level i is now that
      of column t - 1, exactly (column 0 has no previous column: its stream must equal quantize(F));
   b. compares the checksum of the recovered map with that of the forward pass;
   c. computes the gradients of alpha and of the previous map, which need the recovered map.
3. Run a nested backward through the level. It accumulates the parameters' gradients and frees the
   level's graph.
4. Add the gradients of the inputs to those of the maps that they came from.

Example with four levels: c3' stands for level 3 of column t - 1.

    level   F reads    stream before         recovered   stream afterwards
    3       c2         c0 c1 c2 c3           c3'         c0  c1  c2  c3'
    2       c1 c3'     c0 c1 c2 c3'          c2'         c0  c1  c2' c3'
    1       c0 c2'     c0 c1 c2' c3'         c1'         c0  c1' c2' c3'
    0       x  c1'     c0 c1' c2' c3'        c0'         c0' c1' c2' c3'   (huge: F reads c3' too)

Why a nested backward per level instead of returning the parameters' gradients: DeepSpeed's hooks
then fire level by level. Returned gradients break ZeRO-3 and would all be alive at once under
ZeRO-2.

All sums of gradients have the order of plain autograd, so that they round the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pipeline.model import fixed_point
from pipeline.model.column import (
    Columns,
    LevelInputs,
    Residual,
    as_leaf,
    buffers_restored,
    same_convolution_algorithms,
)
from pipeline.model.consistency import DROP_PATH_SCALES
from pipeline.model.fixed_point_columns import (
    ExactContext,
    FixedPointStream,
    alpha_gradient,
    fixed_point_column,
)
from pipeline.model.float_columns import AlphaGradient, run_columns


def exact_columns(
    columns: Columns, x: Tensor, exact: ExactContext, stored: int
) -> tuple[Tensor, ...]:
    """Run all columns on the fixed-point stream. The last ``stored`` columns store activations.

    Returns:
        Level 3 of each tap, then the last column's four maps.
    """
    trainable = any(
        p.requires_grad for levels in columns.levels for level in levels for p in level.parameters()
    )
    tail = FixedPointStream(exact=exact, invertible=False)
    if not torch.is_grad_enabled() or not (x.requires_grad or trainable):
        with torch.no_grad():
            outputs = run_columns(columns, partial(fixed_point_column, columns, x, tail))
        tail.record_consistency(0)
        return outputs

    # Columns before ``first_stored`` are inverted, the others run under plain autograd.
    first_stored = columns.count - stored
    if not x.requires_grad:  # the stem is frozen
        x = as_leaf(x)
    head: tuple[Tensor, ...] = ()
    if first_stored:
        inverted = replace(
            columns,
            levels=columns.levels[:first_stored],
            taps=tuple(t for t in columns.taps if t < first_stored),
            leaf_inputs=exact.compiled,
        )
        head = cast(
            tuple[Tensor, ...],
            ExactColumns.apply(x, inverted, exact, tail if stored else None),  # type: ignore[no-untyped-call]
        )
    if not stored:
        return head
    column_fn = partial(fixed_point_column, columns, x, tail)
    outputs = run_columns(columns, column_fn, head[-4:], first_stored)
    tail.record_consistency(first_stored)
    return (*head[:-4], *outputs)


def autocast_of(device_type: str, state: tuple[bool, torch.dtype]) -> torch.autocast:
    """Return an autocast context (enabled, dtype) without the weight cache.

    A level uses each weight once, so the cache would only keep copies of all weights alive.
    """
    return torch.autocast(device_type, dtype=state[1], enabled=state[0], cache_enabled=False)


class ExactColumnsContext(FunctionCtx):
    """What ``ExactColumns`` saves for its backward pass."""

    saved_tensors: tuple[Tensor, ...]  # stem output, four integer maps, remainders
    columns: Columns
    exact: ExactContext
    autocast: tuple[bool, torch.dtype]
    widths: list[int]  # bits of each remainder
    shapes: list[torch.Size]  # of the four maps, (N, H, W, C)
    checksums: Tensor  # (columns, 4) of the stream
    input_checksums: Tensor  # of the stem's output and, if there are any, the drop path scales


class ExactColumns(torch.autograd.Function):
    """All inverted columns as one function. See the top of this module."""

    # Reading ctx.saved_tensors drops the context's references, so that the inversion can free each
    # remainder after its use.
    clear_saved_tensors_on_access = True

    @staticmethod
    def forward(
        ctx: ExactColumnsContext,
        x: Tensor,
        columns: Columns,
        exact: ExactContext,
        tail: FixedPointStream | None,
    ) -> tuple[Tensor, ...]:
        """``tail``: the stream that continues after the last column of ``columns``, if any."""
        ctx.set_materialize_grads(False)
        stream = FixedPointStream(exact=exact, invertible=True)
        device = x.device.type

        def column_fn(t: int, previous: Sequence[Tensor]) -> list[Tensor]:
            def residual(t: int, i: int) -> Residual:
                return partial(stream.advance, t, i)

            return columns.run_column(t, x, previous, residual)

        # Compiled code differs with and without gradients, so a compiled level must run with
        # gradients on here, too: the recompute then runs the same graph, with the same bits.
        ctx.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        grad_mode = torch.set_grad_enabled(exact.compiled)
        with autocast_of(device, ctx.autocast), grad_mode, same_convolution_algorithms():
            outputs = run_columns(columns, column_fn)
        stream.record_consistency(0)
        if tail is not None:
            tail.maps = [current.clone() for current in stream.maps]
        ctx.columns = columns
        ctx.exact = exact
        ctx.widths = stream.widths
        ctx.shapes = [value.shape for value in outputs[-4:]]
        ctx.checksums = torch.stack(stream.checksums).view(-1, 4)
        inputs = (x, columns.drop_path_scales)
        ctx.input_checksums = torch.stack(
            [fixed_point.checksum(tensor) for tensor in inputs if tensor is not None]
        )
        ctx.save_for_backward(x, *stream.maps, *stream.remainders)
        return outputs

    @staticmethod
    def backward(
        ctx: ExactColumnsContext, *gradients: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        x, *saved = ctx.saved_tensors
        columns = replace(ctx.columns, leaf_inputs=True)
        inversion = Inversion(
            columns=columns,
            x=x.detach(),
            exact=ctx.exact,
            stream=saved[:4],
            remainders=saved[4:],
            widths=ctx.widths,
            shapes=ctx.shapes,
            checksums=ctx.checksums,
        )
        del saved  # the lists of the inversion hold the only references now
        inversion.begin(ctx.input_checksums)
        # The outputs were the taps' level 3, then the last column's maps.
        map_gradients = list(gradients[len(columns.taps) :])
        tap_gradients = dict(zip(columns.taps, gradients, strict=False))
        last = columns.count - 1
        if last in tap_gradients:
            map_gradients[3] = _add(tap_gradients[last], map_gradients[3])
        with autocast_of(x.device.type, ctx.autocast), same_convolution_algorithms():
            for t in reversed(range(columns.count)):
                map_gradients = inversion.invert_column(t, map_gradients, tap_gradients.get(t - 1))
        return inversion.x_gradient, None, None, None


@dataclass(kw_only=True)
class Inversion:
    """State of the backward pass through the columns."""

    columns: Columns
    x: Tensor  # the stem's output
    exact: ExactContext
    stream: list[Tensor]  # four int32 maps (positions, channels), moved back in place
    remainders: list[Tensor]  # packed; used up from the end
    widths: list[int]  # bits of each remainder; used up from the end
    shapes: list[torch.Size]  # of the four maps, (N, H, W, C)
    checksums: Tensor  # (columns, 4) of the stream in the forward pass

    x_gradient: Tensor | None = None
    # Float maps of the column that is being inverted. Dropped when no longer needed.
    maps: list[Tensor | None] = field(default_factory=list)
    # Float maps of the column before it, as far as they are recovered.
    previous: list[Tensor | None] = field(default_factory=list)
    # Gradient that reaches the map just recovered through alpha * c_prev.
    shortcut_gradient: Tensor | None = None

    def begin(self, input_checksums: Tensor) -> None:
        """Check the saved tensors and compute the last column's float maps."""
        saved = (*self.stream, self.x)
        expected = torch.cat([self.checksums[-1], input_checksums[:1]])
        changed = torch.stack([fixed_point.checksum(tensor) for tensor in saved]) != expected
        counts = self.exact.consistency.saved_tensor_changed
        counts[: len(saved)] += changed
        scales = self.columns.drop_path_scales
        if scales is not None:
            counts[DROP_PATH_SCALES] += fixed_point.checksum(scales) != input_checksums[1]
        # No level reads level 3 of its own column, so its float map is not needed. The step is a
        # power of two: only the cast rounds, as in the forward pass.
        step = self.exact.resolution.step
        self.maps = [
            current.to(self.x.dtype).mul_(step).view(shape)
            for current, shape in zip(self.stream[:3], self.shapes, strict=False)
        ]
        self.maps.append(None)
        self.previous = [None] * 4

    def invert_column(
        self, t: int, gradients: list[Tensor | None], tap_gradient: Tensor | None
    ) -> list[Tensor | None]:
        """Invert column ``t`` and run its backward pass.

        Args:
            t: the column.
            gradients: gradients of its four maps. Entries are set to None as they are used.
            tap_gradient: gradient of the tap on level 3 of column ``t - 1``, if there is one.

        Returns:
            The gradients of the four maps of column ``t - 1``.
        """
        previous_gradients: list[Tensor | None] = [None, None, None, tap_gradient]
        for i in (3, 2, 1, 0):
            gradient = gradients[i]
            gradients[i] = None
            if gradient is None:
                gradient = self.x.new_zeros(self.shapes[i])
            inputs = self.columns.inputs_of(t, i, self.x, self.maps, self.previous)
            self.maps[i] = None
            gradient = gradient.contiguous()
            self._backward_through_level(t, i, inputs, gradient)
            del gradient  # free it before the sums below
            # In the order of plain autograd: the shortcut first, then the inputs of F.
            previous_gradients[i] = _add(previous_gradients[i], self.shortcut_gradient)
            self.shortcut_gradient = None
            if i:
                # The last column's gradients belong to autograd: do not change them in place.
                owned = t < self.columns.count - 1
                gradients[i - 1] = _add(gradients[i - 1], inputs.lower.grad, in_place=owned)
            else:
                self.x_gradient = _add(self.x_gradient, inputs.lower.grad, in_place=True)
            if inputs.upper is not None:
                previous_gradients[i + 1] = _add(
                    previous_gradients[i + 1], inputs.upper.grad, in_place=True
                )
            if inputs.top is not None:
                previous_gradients[3] = _add(previous_gradients[3], inputs.top.grad, in_place=True)
        self.maps = self.previous
        self.previous = [None] * 4
        return previous_gradients

    def _backward_through_level(
        self, t: int, i: int, inputs: LevelInputs, gradient: Tensor
    ) -> None:
        """Recompute level ``i`` of column ``t``, recover c[t-1][i], and run the nested backward."""
        level = self.columns.levels[t][i]
        with buffers_restored(level):
            with torch.enable_grad():
                scale = self.columns.drop_path_scale(t, i)
                output = level(*inputs, scale, partial(self._recover, t, i, gradient))
            if t == i == 0:
                # The last level of the inversion: all checks are done. A non-finite gradient here
                # reaches the stem's parameters, and the engine skips the step on all ranks.
                consistency = self.exact.consistency
                flag = consistency.nonfinite_flag(self.exact.skip_on_mismatch)
                gradient = gradient + flag.to(gradient.dtype)
            torch.autograd.backward(output, gradient)

    def _recover(self, t: int, i: int, gradient: Tensor, f: Tensor, alpha: Tensor) -> Tensor:
        """Residual of the recompute: move level ``i`` of the stream back to column ``t - 1``.

        ``gradient``: of the level's output. Returns F with a gradient for alpha.
        """
        flat = f.detach().flatten(0, -2)
        with torch.no_grad():
            if t == 0:
                mismatch = self.exact.kernels.check_start(
                    flat, self.stream[i], self.exact.resolution
                )
                mismatched = mismatch.count_nonzero()
                for_alpha = torch.zeros_like(alpha)
            else:
                mismatched, for_alpha = self._decode(t, i, gradient, flat, alpha)
            self.exact.consistency.mismatched[t, i] += mismatched
        return cast(Tensor, AlphaGradient.apply(f, alpha, for_alpha))  # type: ignore[no-untyped-call]

    def _decode(
        self, t: int, i: int, gradient: Tensor, flat: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Recover c[t-1][i] -> (number of mismatched elements, gradient of alpha)."""
        current = self.stream[i]
        shape = self.shapes[i]
        value, shortcut_gradient, mismatch = self.exact.kernels.decode(
            flat,
            current,
            remainder=fixed_point.unpack(self.remainders.pop(), self.widths.pop(), current.shape),
            gradient=gradient.flatten(0, -2),
            alpha=fixed_point.grid_alpha(alpha),
            resolution=self.exact.resolution,
        )
        recovered = value.view(shape)
        self.previous[i] = recovered
        self.shortcut_gradient = shortcut_gradient.view(shape)
        changed = fixed_point.checksum(current) != self.checksums[t - 1, i]
        for_alpha = alpha_gradient(gradient, recovered).to(alpha.dtype)
        return mismatch.count_nonzero() + changed, for_alpha


def _add(a: Tensor | None, b: Tensor | None, in_place: bool = False) -> Tensor | None:
    """Return a + b, where None counts as zero. ``in_place``: ``a`` was computed here, reuse it."""
    if a is None or b is None:
        return a if b is None else b
    return a.add_(b) if in_place else a + b
