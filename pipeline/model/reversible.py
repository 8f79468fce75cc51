"""Exactly reversible columns: autograd functions whose backward passes recover the activations.

The forward pass keeps the stem's output, the last column's integer maps and the packed remainders
(one bit per element of every column at the initial alpha = 0.5). Each level is one autograd
function (``ExactLevel``), and all of them share one ``ReversibleRun``. Autograd runs their backward
passes from the last column to the first; each inverts its level (see ``inversion``) and returns the
gradients of

    c_prev, lower, upper, top    the maps that the level read
    its parameters               so that hooks fire level by level, as in any other network

Parameters that ZeRO-3 or FSDP2 shards are no inputs of the function: autograd would compare the
gradient's shape with that of the shard. The nested backward of a level accumulates their gradients.

All sums of gradients have the order of plain autograd, so that they round the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pipeline.model import fixed_point
from pipeline.model.column import Columns, LevelInputs, as_leaf, same_convolution_algorithms
from pipeline.model.fixed_point_columns import (
    ExactContext,
    FixedPointStream,
    fixed_point_column,
)
from pipeline.model.float_columns import run_columns
from pipeline.model.inversion import Inversion
from pipeline.model.level_tensors import USE_STORED, LevelTensors, refuse_create_graph


def autocast_of(
    device_type: str, state: tuple[bool, torch.dtype]
) -> AbstractContextManager[torch.autocast | None]:
    """Return an autocast context (enabled, dtype) without the weight cache.

    A level uses each weight once, so the cache would only keep copies of all weights alive.
    """
    # Every level asks for one, so do not enter a context that changes nothing.
    if not state[0] and not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype=state[1], enabled=state[0], cache_enabled=False)


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
        )
        head = inverted_columns(inverted, x, exact, tail if stored else None)
    if not stored:
        return head
    column_fn = partial(fixed_point_column, columns, x, tail)
    outputs = run_columns(columns, column_fn, head[-4:], first_stored)
    tail.record_consistency(first_stored)
    return (*head[:-4], *outputs)


def inverted_columns(
    columns: Columns, x: Tensor, exact: ExactContext, tail: FixedPointStream | None
) -> tuple[Tensor, ...]:
    """Run ``columns`` so that the backward pass inverts them.

    ``tail``: the stream that continues after the last of them, if any.
    """
    run = ReversibleRun(columns, exact, x.device.type)
    token: Tensor | None = None

    def column_fn(t: int, previous: Sequence[Tensor]) -> list[Tensor]:
        nonlocal token
        maps: list[Tensor] = []
        for i, level in enumerate(columns.levels[t]):
            tensors = LevelTensors(level)
            run.tensors.append(tensors)
            inputs = columns.inputs_of(t, i, x, maps, previous)
            shortcut = previous[i] if t else None
            value, token = ExactLevel.apply(  # type: ignore[no-untyped-call]
                run, 4 * t + i, token, shortcut, *inputs, *tensors.trainable
            )
            maps.append(value)
        return maps

    outputs = run_columns(columns, column_fn)
    run.finish_forward(x, [value.shape for value in outputs[-4:]])
    if tail is not None:
        tail.maps = [current.clone() for current in run.stream.maps]
    return outputs


class ExactLevelContext(FunctionCtx):
    """What ``ExactLevel`` keeps for its backward pass."""

    run: ReversibleRun
    index: int
    needs_input_grad: tuple[bool, ...]


class ExactLevel(torch.autograd.Function):
    """One level of one column. See the top of this module."""

    @staticmethod
    def forward(
        ctx: ExactLevelContext,
        run: ReversibleRun,
        index: int,
        token: Tensor | None,
        shortcut: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the level.

        Args:
            ctx: of autograd.
            run: shared by the levels of this pass.
            index: 4 * column + level.
            token: of the level before. It carries no value: it makes autograd run the backward
                passes of the levels one after the other, in the order of the inversion.
            shortcut: the same level's map in the previous column.
            tensors: inputs of F (lower, upper, top), then the level's parameters.
        """
        ctx.set_materialize_grads(False)
        ctx.run = run
        ctx.index = index
        lower, upper, top = tensors[:3]
        assert lower is not None
        value = run.forward_level(index, LevelInputs(lower, upper, top))
        return value, value.new_empty(0)

    @staticmethod
    def backward(ctx: ExactLevelContext, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_create_graph()
        return (None, None, None, *ctx.run.backward_level(ctx.index, gradients[0]))


class ReversibleRun:
    """One pass through the inverted columns: the forward stream, then the state of the inversion.

    An object and not a tuple, so that ZeRO's hooks do not walk through its tensors.
    """

    def __init__(self, columns: Columns, exact: ExactContext, device_type: str) -> None:
        self.columns = columns
        self.exact = exact
        self.device_type = device_type
        self.autocast = (
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
        )
        self.stream = FixedPointStream(exact=exact, invertible=True)
        self.tensors: list[LevelTensors] = []  # one item per level of every column
        self.saved: Inversion | None = None  # None after its use
        self.inversion: Inversion | None = None  # that is under way

    def forward_level(self, index: int, inputs: LevelInputs) -> Tensor:
        """Run a level and return its map (N, H, W, C)."""
        t, i = divmod(index, 4)
        level = self.columns.levels[t][i]
        scale = self.columns.drop_path_scale(t, i)
        # Compiled code differs with and without gradients, so a compiled level must run with
        # gradients on here, too: the recompute then runs the same graph, with the same bits.
        compiled = self.exact.compiled
        grad_mode = torch.set_grad_enabled(compiled)
        autocast = autocast_of(self.device_type, self.autocast)
        with autocast, grad_mode, same_convolution_algorithms():
            value = level(
                *(inputs.as_leaves() if compiled else inputs),
                scale,
                partial(self.stream.advance, t, i),
            )
        return cast(Tensor, value)

    def finish_forward(self, x: Tensor, shapes: list[torch.Size]) -> None:
        """Keep what the inversion starts from. ``shapes``: of the four maps, (N, H, W, C)."""
        self.stream.record_consistency(0)
        inputs = (x, self.columns.drop_path_scales)
        self.saved = Inversion(
            columns=self.columns,
            x=x.detach(),
            exact=self.exact,
            tensors=self.tensors,
            stream=self.stream.maps,
            remainders=self.stream.remainders,
            widths=self.stream.widths,
            shapes=shapes,
            checksums=torch.stack(self.stream.checksums).view(-1, 4),
            input_checksums=torch.stack(
                [fixed_point.checksum(tensor) for tensor in inputs if tensor is not None]
            ),
            index=4 * self.columns.count - 1,
        )

    def backward_level(self, index: int, gradient: Tensor | None) -> list[Tensor | None]:
        """Invert a level and return the gradients of ``ExactLevel``'s tensors.

        Levels that autograd skips, because the loss does not depend on them, are inverted too.
        """
        with autocast_of(self.device_type, self.autocast), same_convolution_algorithms():
            if self.inversion is None or self.inversion.index < index:
                self.inversion = self._begin_inversion()
            while self.inversion.index > index:
                self.inversion.invert_level(None)
            gradients = self.inversion.invert_level(gradient)
        if index == 0:  # the first level of column 0 comes last: free its memory
            self.inversion = None
        return gradients

    def _begin_inversion(self) -> Inversion:
        if self.saved is None:
            raise RuntimeError(
                "second backward pass through exactly reversible columns: the first one has used "
                "up their activations. Call the first one with retain_graph=True (which keeps one "
                f"column in memory), or add the losses and call backward() once. {USE_STORED}, "
                "for any number of passes at any memory"
            )
        # Whether backward() was called with retain_graph=True.
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        inversion = self.saved.copy() if keep else self.saved
        self.saved = self.saved if keep else None
        inversion.begin()
        return inversion
