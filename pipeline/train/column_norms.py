"""Norms of gradients, weights and updates per column, from a sample of their elements.

The optimizer's hooks see each flat (``zero_state``) right before and after its update, with the
gradients of all ranks, clipped. Evenly spaced elements of every fragment stand for all of it: up to
``SAMPLES`` elements a norm is exact, beyond it is an estimate of about 1% for a column of many
fragments. The old values are kept for the sample only, so an update needs no second copy of the
weights. Nothing waits for the device until ``read``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.monitor import tags
from pipeline.train.zero_state import Fragment, ShardedState

SAMPLES = 1024  # of a fragment
GRADIENT = 0
WEIGHT = 1
UPDATE = 2


class _Sample:
    """Elements of one flat, the group that each belongs to, and how many others it stands for."""

    def __init__(self, fragments: list[tuple[int, Fragment]], groups: int, device: torch.device):
        index, group, weight = [], [], []
        for number, fragment in fragments:
            count = min(SAMPLES, fragment.length)
            # Example: 3000 elements, 1024 samples: elements 0, 2, 5, 8, ... of the fragment.
            places = torch.arange(count) * fragment.length // count + fragment.start
            index.append(places)
            group.append(torch.full((count,), number))
            weight.append(torch.full((count,), fragment.length / count))
        empty = [torch.zeros(0, dtype=torch.int64)]
        self.index = torch.cat(index or empty).to(device)
        self.group = torch.cat(group or empty).to(device)
        self.weight = torch.cat(weight or [torch.zeros(0)]).to(device)
        self.before = torch.zeros(0)
        self.sums = torch.zeros(3, groups, device=device)

    def values(self, flat: Tensor) -> Tensor:
        """The sampled elements, in fp32."""
        return flat.detach().reshape(-1)[self.index].float()

    def record(self, row: int, values: Tensor) -> None:
        """Replace a row of sums of squares per group."""
        # Example: of 3000 elements 1024 are sampled, so each square counts 2.93 times.
        squares = values.square() * self.weight
        self.sums[row] = torch.zeros_like(self.sums[row]).index_add_(0, self.group, squares)


class ColumnNorms:
    """Watches the optimizer of a stage.

    Attributes:
        active: whether the next update is recorded. Set it for the steps that are logged.
    """

    def __init__(self, state: ShardedState) -> None:
        self.active = False
        self._recorded = False
        self._names = ["stem", *(f"column_{t}" for t in range(state.engine.module.spec.columns))]
        self._names.append("heads")
        self._replicated = state.zero_stage == 0
        # Each rank looks at its own flats only, whose elements no other rank owns.
        by_flat: list[list[tuple[int, Fragment]]] = [[] for _ in state.flats]
        for fragment in state.fragments:
            by_flat[fragment.flat].append((self._group(fragment.name), fragment))
        self._samples = {
            tensor: _Sample(fragments, len(self._names), tensor.device)
            for tensor, fragments in zip(state.stepped_tensors(), by_flat, strict=True)
        }
        state.torch_optimizer.register_step_pre_hook(lambda optimizer, *_: self._before(optimizer))
        state.torch_optimizer.register_step_post_hook(lambda optimizer, *_: self._after(optimizer))

    def _group(self, name: str) -> int:
        """columns.3.levels... -> 4; the stem has 0 and the heads the last number."""
        first, _, rest = name.partition(".")
        if first == "columns":
            return 1 + int(rest.partition(".")[0])
        return 0 if first == "stem" else len(self._names) - 1

    # DeepSpeed calls the optimizer once per flat, with that flat as its only parameter. A hook may
    # run twice for one update (of a class and of the class below it), and a retried step runs
    # again: recording replaces what was recorded before.

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        for tensor, sample in self._stepped(optimizer):
            if tensor.grad is not None:
                sample.before = sample.values(tensor)
                sample.record(GRADIENT, sample.values(tensor.grad))
                sample.record(WEIGHT, sample.before)
                self._recorded = True

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer) -> None:
        for tensor, sample in self._stepped(optimizer):
            if tensor.grad is not None:
                sample.record(UPDATE, sample.values(tensor) - sample.before)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, _Sample]]:
        for group in optimizer.param_groups if self.active else ():
            for tensor in group["params"]:
                if tensor in self._samples:
                    yield tensor, self._samples[tensor]

    def read(self) -> dict[str, float]:
        """The norms of the last recorded update by tag; {} without one. Collective; waits."""
        if not self._recorded:  # all ranks skip an update together
            return {}
        self._recorded = False
        # One reduction for all norms.
        sums = sum((sample.sums.double() for sample in self._samples.values()), torch.zeros(()))
        assert isinstance(sums, Tensor)
        dist.all_reduce(sums)
        if self._replicated:  # every rank has counted all weights
            sums /= dist.get_world_size()
        gradient, weight, update = sums.sqrt().tolist()
        norms = {}
        for i, name in enumerate(self._names):
            norms[tags.gradient_norm(name)] = gradient[i]
            norms[tags.weight_norm(name)] = weight[i]
            norms[tags.update_norm(name)] = update[i]
        return norms
