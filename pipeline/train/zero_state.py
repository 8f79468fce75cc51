"""The sharded fp32 state of a DeepSpeed engine, in one view for every ZeRO stage.

Each rank owns flat fp32 tensors ("flats"), which hold its share of the parameters. A ``Fragment``
maps a range of one parameter to a range of one flat. Optimizer moments and the EMA are flats of the
same layout. Therefore checkpoints, the alpha clamp, the EMA and evaluation with averaged weights
need no gathering of parameters.

Example: two ranks under ZeRO-1, two parameters in one group, ``a`` of 10 elements and ``b`` of 4.
DeepSpeed lays them end to end (14 elements) and gives each rank one half, so ``a`` is split over
the flats of both ranks::

    position   0 1 2 3 4 5 6 | 7 8 9 10 11 12 13
    parameter  a a a a a a a | a a a b  b  b  b
    owner      rank 0        | rank 1

    rank 0   Fragment(name="a", shape=(10,), offset=0, length=7, flat=0, start=0)
    rank 1   Fragment(name="a", shape=(10,), offset=7, length=3, flat=0, start=0)
             Fragment(name="b", shape=(4,),  offset=0, length=4, flat=0, start=3)

Every private name of DeepSpeed that the pipeline relies on is in this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from pipeline.optimizers.flat_layout import FlatLayout, ParameterwiseOptimizer, Segment
from pipeline.train.engine import DeepSpeedEngine
from pipeline.train.offload import Allocate, zeros_beside

BEST = "best"  # kind of the best weights so far
REPLICATED = -1  # ``Fragment.flat`` of a tensor that every rank holds completely


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A range of a parameter and its place in this rank's flats.

    Elements [offset, offset + length) of the flattened parameter ``name`` are elements
    [start, start + length) of flat number ``flat``. ``shape`` is that of the whole parameter.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    length: int
    flat: int
    start: int

    def of(self, flats: list[Tensor]) -> Tensor:
        """This range in ``flats``, as a view."""
        return flats[self.flat].narrow(0, self.start, self.length)


class ShardedState:
    """fp32 weights, optimizer moments and EMA of one rank.

    Args:
        moments: the tensors of the optimizer's state that have one value per weight.
        with_ema: keep an exponential moving average (``train/ema.py`` updates it). It starts from
            the current weights.
        with_best: keep a copy of the best weights so far (``remember_best`` replaces it), on the
            host. Until the first call it has no meaning.
        allocate: makes the tensors that only the update reads: moments and average.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        *,
        moments: Sequence[str],
        with_ema: bool,
        with_best: bool = False,
        allocate: Allocate = zeros_beside,
    ) -> None:
        self.engine = engine
        self.moments = moments
        self.zero_stage = int(engine.zero_optimization_stage())
        self.parameters: dict[str, Parameter] = dict(engine.module.named_parameters())
        # Running statistics of BatchNorm. Every rank holds them completely.
        self.buffers = {
            name: buffer
            for name, buffer in engine.module.named_buffers()
            if buffer.is_floating_point()
        }
        # Shapes of whole parameters: under ZeRO-3 ``ds_shape``, as the parameter itself is empty.
        self.shapes = {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self.parameters.items()
        }
        self.shapes |= {name: tuple(buffer.shape) for name, buffer in self.buffers.items()}
        self.torch_optimizer = self._find_optimizer()
        self.flats = self._find_flats()
        self.fragments = list(self._find_fragments())
        self._share_layout()
        self._reset_moments(allocate)
        self.ema = None
        if with_ema:
            self.ema = [allocate(flat.detach()).copy_(flat.detach()) for flat in self.flats]
        # Not on the device: its memory decides how large a network can be.
        self.best = [_host_copy(flat) for flat in self.flats] if with_best else None
        self._best_buffers = {name: _host_copy(buffer) for name, buffer in self.buffers.items()}

    def _find_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer inside DeepSpeed's wrappers: none under ZeRO 0, one or two otherwise."""
        optimizer = self.engine.optimizer
        if self.zero_stage > 0:
            optimizer = optimizer.optimizer
        unwrapped: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return unwrapped

    def _find_flats(self) -> list[Tensor]:
        if self.zero_stage == 0:
            # Nothing is sharded: each parameter, flattened, is a flat of its own.
            return [parameter.data.view(-1) for parameter in self.parameters.values()]
        if self.zero_stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def _find_fragments(self) -> Iterator[Fragment]:
        # DeepSpeed hands out views of the flats. A view shares its storage with exactly one flat,
        # which tells where in the flats it lies.
        flat_numbers = {
            flat.untyped_storage().data_ptr(): number for number, flat in enumerate(self.flats)
        }
        for name, parameter in self.parameters.items():
            view, offset = self._owned_range(name, parameter)
            if view is None or view.numel() == 0:
                continue  # this rank owns nothing of the parameter
            flat = flat_numbers[view.untyped_storage().data_ptr()]
            start = int(view.storage_offset() - self.flats[flat].storage_offset())
            yield Fragment(
                name=name,
                shape=self.shapes[name],
                offset=offset,
                length=view.numel(),
                flat=flat,
                start=start,
            )

    def _owned_range(self, name: str, parameter: Parameter) -> tuple[Tensor | None, int]:
        """The part of a parameter that this rank owns: (view of a flat, offset in parameter)."""
        if self.zero_stage == 0:
            return parameter.data.view(-1), 0
        if self.zero_stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param

            # ZeRO-3 cuts every parameter into equal parts, one per rank, and pads the last ones.
            # Example: 10 elements on 4 ranks are parts of 3; rank 3 has offset 9 and one element.
            view: Tensor = safe_get_local_fp32_param(parameter)
            offset = torch.distributed.get_rank() * view.numel()
            return view[: max(0, min(view.numel(), math.prod(self.shapes[name]) - offset))], offset
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None, 0
        return mapping.get_hp_fragment(), int(mapping.lp_fragment_address.start)

    def _share_layout(self) -> None:
        """Give an optimizer that computes per parameter the places of the parameters."""
        # Under ZeRO 0 the optimizer has the parameters themselves.
        if self.zero_stage == 0 or not isinstance(self.torch_optimizer, ParameterwiseOptimizer):
            return
        # A parameter has the same number on every rank, also where a rank owns nothing of it.
        numbers = {name: number for number, name in enumerate(self.parameters)}
        segments: dict[Tensor, list[Segment]] = {flat: [] for flat in self.flats}
        for fragment in self.fragments:
            segments[self.flats[fragment.flat]].append(
                Segment(numbers[fragment.name], fragment.start, fragment.length)
            )
        self.torch_optimizer.layout = FlatLayout(segments, len(numbers))

    def stepped_tensors(self) -> list[Tensor]:
        """The tensors that the optimizer steps, the keys of its state: parallel to ``flats``."""
        return list(self.parameters.values()) if self.zero_stage == 0 else self.flats

    def _reset_moments(self, allocate: Allocate) -> None:
        """Set moments and step count to zero.

        DeepSpeed takes a step on zero gradients when it creates some of its optimizers.
        """
        for key in self.stepped_tensors():
            self.torch_optimizer.state[key] = {
                "step": torch.zeros((), dtype=torch.float32),
                **{moment: allocate(key.detach()) for moment in self.moments},
            }

    def set_step(self, step: int) -> None:
        """Set the optimizer's step count, which a bias correction uses."""
        for key in self.stepped_tensors():
            self.torch_optimizer.state[key]["step"].fill_(float(step))

    def flats_by_kind(self) -> dict[str, list[Tensor]]:
        """``master`` (the fp32 weights), the moments; if kept, ``ema`` and ``best``.

        All of them are flats of one layout.
        """
        kinds = {"master": self.flats}
        for moment in self.moments:
            kinds[moment] = [
                self.torch_optimizer.state[key][moment].view(-1) for key in self.stepped_tensors()
            ]
        if self.ema is not None:
            kinds["ema"] = self.ema
        if self.best is not None:
            kinds[BEST] = self.best
        return kinds

    def tensors(self) -> Iterator[tuple[Fragment, str, Tensor]]:
        """(fragment, kind, values) of all that this rank holds; the values are writable views.

        Running statistics are replicated on every rank (flat = -1); their EMA is the value itself,
        but the best weights have those of their own step.
        """
        kinds = self.flats_by_kind()
        for fragment in self.fragments:
            for kind, flats in kinds.items():
                yield fragment, kind, fragment.of(flats)
        for name, buffer in self.buffers.items():
            replicated = Fragment(
                name=name,
                shape=self.shapes[name],
                offset=0,
                length=buffer.numel(),
                flat=REPLICATED,
                start=0,
            )
            for kind in ("master", "ema") if self.ema is not None else ("master",):
                yield replicated, kind, buffer.view(-1)
            if self.best is not None:
                yield replicated, BEST, self._best_buffers[name].view(-1)

    @torch.no_grad()
    def average_buffers(self) -> None:
        """Set the running statistics to their mean over the ranks. Collective.

        Called after every update, so that between two steps all ranks have the same ones. Averaging
        only for checkpoints would be cheaper, but a sum that is rounded at another step has other
        bits: a run that was interrupted would end with other weights than one that was not.
        """
        world_size = torch.distributed.get_world_size()
        if not self.buffers or world_size == 1:
            return
        # One reduction for all buffers.
        flat_buffers = [buffer.view(-1) for buffer in self.buffers.values()]
        sums = torch.cat(flat_buffers)
        torch.distributed.all_reduce(sums)
        means = (sums / world_size).split([buffer.numel() for buffer in flat_buffers])
        torch._foreach_copy_(flat_buffers, list(means))

    @torch.no_grad()
    def remember_best(self) -> None:
        """Copy the weights that evaluation uses (the EMA if there is one) to ``best``.

        No communication: each rank copies its share.
        """
        if self.best is None:
            return
        torch._foreach_copy_(self.best, self.flats if self.ema is None else self.ema)
        for name, buffer in self.buffers.items():
            self._best_buffers[name].copy_(buffer)

    @torch.no_grad()
    def copy_to_model(self, values: list[Tensor]) -> None:
        """Make the network compute with ``values`` (flats, for example ``ema``). Collective."""
        optimizer = self.engine.optimizer
        if self.zero_stage == 0:
            # The flats are the network's parameters.
            for flat, value in zip(self.flats, values, strict=True):
                flat.copy_(value)
        elif self.zero_stage == 3:
            # 1. Release all gathered parameters, so that the next forward pass gathers again.
            # 2. Overwrite this rank's low-precision partitions.
            optimizer.parameter_offload.partition_all_parameters()
            for fragment in self.fragments:
                partition: Tensor = self.parameters[fragment.name].ds_tensor.data  # type: ignore[attr-defined]
                partition[: fragment.length].copy_(fragment.of(values))
        else:
            # 1. Overwrite this rank's share of the low-precision weights.
            # 2. Exchange the shares: every rank holds all low-precision weights.
            rank = torch.distributed.get_rank()
            for group, value in enumerate(values):
                share = optimizer.parallel_partitioned_bit16_groups[group][rank]
                share.data.copy_(value)
                torch.distributed.all_gather_into_tensor(
                    optimizer.bit16_groups_flat[group].data, share.data.clone()
                )

    def backup_weights(self) -> list[Tensor]:
        """What ``restore_weights`` needs after ``copy_to_model`` has copied other values.

        Only ZeRO 0 needs a copy, because there ``copy_to_model`` overwrites the fp32 weights.
        """
        if self.zero_stage == 0:
            return [flat.detach().clone() for flat in self.flats]
        return self.flats

    def restore_weights(self, backup: list[Tensor]) -> None:
        """Make the network compute with the weights of ``backup_weights`` again. Collective."""
        self.copy_to_model(backup)

    def low_precision_copies(self, name: str) -> Iterator[Tensor]:
        """The tensors of this rank from which the next forward pass reads parameter ``name``."""
        parameter = self.parameters[name]
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor.data  # ZeRO-3: this rank's partition
        if parameter.data.numel():
            yield parameter.data  # empty while ZeRO-3 has released the parameter


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy of its own in the host's memory."""
    return tensor.detach().to("cpu", copy=True)
