"""Norms of whole parameters for an optimizer that holds only this rank's flat ranges of them.

DeepSpeed's ZeRO engines give an optimizer flat tensors ("flats") instead of parameters: each rank
has a share of the weights laid end to end. Example: ``a`` of 10 elements and ``b`` of 4 on two
ranks under ZeRO-1::

    rank 0   flat  a a a a a a a     Segment(parameter=0, start=0, length=7)
    rank 1   flat  a a a b b b b     Segment(parameter=0, start=0, length=3)
                                     Segment(parameter=1, start=3, length=4)

The norm of ``a`` is the root of the sum of squares over both ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Elements [start, start + length) of a flat belong to the parameter of this number."""

    parameter: int
    start: int
    length: int


class FlatLayout:
    """Where parameters lie in the flats of this rank.

    Args:
        segments: those of each flat. Padding belongs to none.
        parameters: number of all parameters, on all ranks the same and in the same order.
    """

    def __init__(self, segments: Mapping[Tensor, Sequence[Segment]], parameters: int) -> None:
        self._segments = segments
        self._parameters = parameters
        # On the device from the start: copying them in every step would wait for it.
        self._numbers = {
            flat: torch.tensor([segment.parameter for segment in held], device=flat.device)
            for flat, held in segments.items()
        }

    def ranges(self, flat: Tensor, values: Tensor) -> list[Tensor]:
        """The range of each parameter in ``values``, which is laid out like ``flat``; views."""
        return [values.narrow(0, segment.start, segment.length) for segment in self._segments[flat]]

    def norms(self, flat: Tensor, values: Sequence[Tensor]) -> Tensor:
        """L2 norm of each parameter that has a range in ``flat``. Collective; no wait on the host.

        Args:
            values: tensors that are laid out like ``flat``, for example weights and updates.

        Returns:
            (number of ``values``, number of ranges).
        """
        # Every rank fills in the sums that it can; parameters of other ranks are zero here.
        sums = torch.zeros(len(values), self._parameters, dtype=flat.dtype, device=flat.device)
        numbers = self._numbers[flat]
        for row, tensor in zip(sums, values, strict=True):
            if len(numbers):
                norms = torch.stack(torch._foreach_norm(self.ranges(flat, tensor)))
                row.index_copy_(0, numbers, norms.square())
        dist.all_reduce(sums)
        return sums.index_select(1, numbers).sqrt()


class ParameterwiseOptimizer(torch.optim.Optimizer):
    """Base of optimizers that compute something per parameter.

    ``layout`` is None where each tensor of the optimizer is one whole parameter, as in plain
    PyTorch; ``ShardedState`` sets it where the tensors are flats.
    """

    layout: FlatLayout | None = None
