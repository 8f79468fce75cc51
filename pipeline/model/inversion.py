"""Inversion of exactly reversible columns: recover the activations and compute the gradients.

The backward pass recovers the columns from the last to the first, and in each column the levels
from the coarsest to the finest. Steps for level i of column t:

1. Take the inputs of F: ``lower`` from column t, ``upper`` and ``top`` from column t - 1. All are
   known, because coarser levels of column t - 1 were recovered first.
2. Recompute F under autograd. The level ends in ``_recover``, which
   a. subtracts quantize(F) from the stream and divides by alpha: the stream's level i is now that
      of column t - 1, exactly (column 0 has no previous column: its stream must equal quantize(F));
   b. compares the checksum of the recovered map with that of the forward pass;
   c. computes the gradients of alpha and of the previous map, which need the recovered map.
3. Run a nested backward through the level. It frees the level's graph.
4. Hand the gradients of c_prev, of the inputs and of the parameters to autograd.

Example with four levels: c3' stands for level 3 of column t - 1.

    level   F reads    stream before         recovered   stream afterwards
    3       c2         c0 c1 c2 c3           c3'         c0  c1  c2  c3'
    2       c1 c3'     c0 c1 c2 c3'          c2'         c0  c1  c2' c3'
    1       c0 c2'     c0 c1 c2' c3'         c1'         c0  c1' c2' c3'
    0       x  c1'     c0 c1' c2' c3'        c0'         c0' c1' c2' c3'   (huge: F reads c3' too)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from pipeline.model import fixed_point
from pipeline.model.column import Columns, LevelInputs, buffers_restored
from pipeline.model.consistency import DROP_PATH_SCALES
from pipeline.model.fixed_point_columns import ExactContext, alpha_gradient
from pipeline.model.float_columns import AlphaGradient
from pipeline.model.level_tensors import LevelTensors


@dataclass(kw_only=True)
class Inversion:
    """State of the backward pass through the columns. ``index`` is 4 * column + level."""

    columns: Columns
    x: Tensor  # the stem's output
    exact: ExactContext
    tensors: list[LevelTensors]  # one item per level of every column
    stream: list[Tensor]  # four int32 maps (positions, channels), moved back in place
    remainders: list[Tensor]  # packed; used up from the end
    widths: list[int]  # bits of each remainder; used up from the end
    shapes: list[torch.Size]  # of the four maps, (N, H, W, C)
    checksums: Tensor  # (columns, 4) of the stream in the forward pass
    input_checksums: Tensor  # of the stem's output and, if there are any, the drop path scales
    index: int  # of the level that is inverted next

    # Float maps of the column that is being inverted. Dropped when no longer needed.
    maps: list[Tensor | None] = field(default_factory=list)
    # Float maps of the column before it, as far as they are recovered.
    previous: list[Tensor | None] = field(default_factory=list)
    # Gradient that reaches the map just recovered through alpha * c_prev.
    shortcut_gradient: Tensor | None = None

    def copy(self) -> Inversion:
        """Return a copy that can be used up, of an inversion that has not begun."""
        return replace(
            self,
            stream=[current.clone() for current in self.stream],
            remainders=list(self.remainders),
            widths=list(self.widths),
        )

    def begin(self) -> None:
        """Check the saved tensors and compute the last column's float maps."""
        saved = (*self.stream, self.x)
        expected = torch.cat([self.checksums[-1], self.input_checksums[:1]])
        changed = torch.stack([fixed_point.checksum(tensor) for tensor in saved]) != expected
        counts = self.exact.consistency.saved_tensor_changed
        counts[: len(saved)] += changed
        scales = self.columns.drop_path_scales
        if scales is not None:
            counts[DROP_PATH_SCALES] += fixed_point.checksum(scales) != self.input_checksums[1]
        # No level reads level 3 of its own column, so its float map is not needed. The step is a
        # power of two: only the cast rounds, as in the forward pass.
        step = self.exact.resolution.step
        self.maps = [
            current.to(self.x.dtype).mul_(step).view(shape)
            for current, shape in zip(self.stream[:3], self.shapes, strict=False)
        ]
        self.maps.append(None)
        self.previous = [None] * 4

    def invert_level(self, gradient: Tensor | None) -> list[Tensor | None]:
        """Invert the level at ``index`` and run its backward pass.

        Args:
            gradient: of the level's output, or None if the loss does not depend on it. Then there
                is nothing to do but to recover the map.

        Returns:
            The gradients of c_prev, of the inputs of F (lower, upper, top) and of the parameters.
        """
        t, i = divmod(self.index, 4)
        inputs = self.columns.inputs_of(t, i, self.x, self.maps, self.previous).as_leaves()
        self.maps[i] = None
        tensors = self.tensors[self.index]
        tensors.check_unchanged(t, i)
        gradient = None if gradient is None else gradient.contiguous()
        for_inputs, for_parameters = self._backward_through_level(t, i, inputs, gradient)
        gradients = [self.shortcut_gradient, *for_inputs, *for_parameters]
        self.shortcut_gradient = None
        if i == 0:
            self.maps = self.previous
            self.previous = [None] * 4
        self.index -= 1
        return gradients

    def _backward_through_level(
        self, t: int, i: int, inputs: LevelInputs, gradient: Tensor | None
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Recompute level ``i`` of column ``t`` and recover c[t-1][i].

        Returns the gradients of the inputs of F, and those of the parameters.
        """
        level = self.columns.levels[t][i]
        tensors = self.tensors[self.index]
        with tensors.substituted() as parameters, buffers_restored(level):
            with torch.set_grad_enabled(gradient is not None or self.exact.compiled):
                scale = self.columns.drop_path_scale(t, i)
                output = level(*inputs, scale, partial(self._recover, t, i, gradient))
            if gradient is None:
                return [None] * 3, [None] * len(parameters)
            if t == i == 0:
                # The last level of the inversion: all checks are done. A non-finite gradient here
                # reaches the stem's parameters, and the engine skips the step on all ranks.
                gradient = gradient + self.exact.nonfinite_flag().to(gradient.dtype)
            leaves = [leaf for leaf in inputs if leaf is not None]
            if tensors.sharded:
                torch.autograd.backward(output, gradient)
                return [None if leaf is None else leaf.grad for leaf in inputs], []
            computed = torch.autograd.grad(
                output, [*leaves, *parameters], gradient, allow_unused=True
            )
        by_input = iter(computed)
        for_inputs = [None if leaf is None else next(by_input) for leaf in inputs]
        return for_inputs, list(by_input)

    def _recover(self, t: int, i: int, gradient: Tensor | None, f: Tensor, alpha: Tensor) -> Tensor:
        """Residual of the recompute: move level ``i`` of the stream back to column ``t - 1``.

        ``gradient``: of the level's output, if there is one. Returns F with a gradient for alpha.
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
        self, t: int, i: int, gradient: Tensor | None, flat: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Recover c[t-1][i] -> (number of mismatched elements, gradient of alpha)."""
        current = self.stream[i]
        shape = self.shapes[i]
        without_gradient = gradient is None
        if gradient is None:  # any tensor of the shape will do
            gradient = flat.view(shape)
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
        changed = fixed_point.checksum(current) != self.checksums[t - 1, i]
        if without_gradient:
            return mismatch.count_nonzero() + changed, torch.zeros_like(alpha)
        self.shortcut_gradient = shortcut_gradient.view(shape)
        for_alpha = alpha_gradient(gradient, recovered).to(alpha.dtype)
        return mismatch.count_nonzero() + changed, for_alpha
