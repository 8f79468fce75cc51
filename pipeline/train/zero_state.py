"""The fp32 masters of a DeepSpeed engine, in one view for every ZeRO stage. All private DeepSpeed names live here.

Each rank owns flat fp32 tensors (its share of the parameters); a ``Fragment`` says which range of which parameter lies
where in them. Optimizer moments and the EMA are flats of the same layout, so that checkpoints, clamps, averages and
evaluation with averaged weights need no gathering of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.model.fixed_point import ALPHA_LIMIT
from pipeline.model.param_groups import is_alpha

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements [offset, offset + length) of parameter ``name`` (flattened), at [start, start + length) of flat ``flat``."""

    name: str
    shape: tuple[int, ...]
    offset: int
    length: int
    flat: int
    start: int


class ShardedState:
    """fp32 masters, optimizer moments and EMA of one rank."""

    def __init__(self, engine: Any, ema_decay: float) -> None:
        self.engine, self.stage, self.ema_decay = (
            engine,
            int(engine.zero_optimization_stage()),
            ema_decay,
        )
        self.parameters: dict[str, Any] = dict(engine.module.named_parameters())
        self.buffers = {
            name: b for name, b in engine.module.named_buffers() if b.is_floating_point()
        }  # of BatchNorm
        self.shapes = {
            name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.parameters.items()
        }  # whole ones
        self.shapes |= {name: tuple(buffer.shape) for name, buffer in self.buffers.items()}
        self.base: Any = engine.optimizer if self.stage == 0 else engine.optimizer.optimizer
        self.base = getattr(self.base, "optimizer", self.base)
        self.flats = self._find_flats()
        self.fragments = list(self._find_fragments())
        self._reset_moments()
        self.ema = [flat.detach().clone() for flat in self.flats] if ema_decay else None
        self._backup: list[Tensor] = []

    def _find_flats(self) -> list[Tensor]:
        if self.stage == 0:
            return [parameter.data.view(-1) for parameter in self.parameters.values()]
        if self.stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def _find_fragments(self) -> Iterator[Fragment]:
        where = {flat.untyped_storage().data_ptr(): i for i, flat in enumerate(self.flats)}
        for name, parameter in self.parameters.items():
            shape = self.shapes[name]
            total = math.prod(shape)
            if self.stage == 0:
                master, offset = parameter.data.view(-1), 0
            elif self.stage == 3:
                from deepspeed.utils import safe_get_local_fp32_param

                master = safe_get_local_fp32_param(parameter)
                offset = torch.distributed.get_rank() * master.numel()
                master = master[: max(0, min(master.numel(), total - offset))]
            else:
                mapping = parameter._hp_mapping
                if mapping is None:
                    continue
                master, offset = mapping.get_hp_fragment(), mapping.lp_fragment_address.start
            if master.numel():
                flat = where[master.untyped_storage().data_ptr()]
                start = master.storage_offset() - self.flats[flat].storage_offset()
                yield Fragment(name, shape, offset, master.numel(), flat, start)

    def _keys(self) -> list[Any]:
        """What the optimizer's state is keyed by, parallel to ``flats``."""
        return list(self.parameters.values()) if self.stage == 0 else self.flats

    def _reset_moments(self) -> None:
        """Zero moments and step count: DeepSpeed may have taken a step on zero gradients when it made the optimizer."""
        for key in self._keys():
            self.base.state[key] = {
                "step": torch.zeros((), dtype=torch.float32),
                **{moment: torch.zeros_like(key, dtype=torch.float32) for moment in MOMENTS},
            }

    def set_step(self, step: int) -> None:
        """Set the optimizer's step count (of its bias correction)."""
        for key in self._keys():
            self.base.state[key]["step"].fill_(float(step))

    def flats_by_kind(self) -> dict[str, list[Tensor]]:
        """``master``, the moments and, where kept, ``ema``: flats of one layout."""
        kinds = {"master": self.flats}
        for moment in MOMENTS:
            kinds[moment] = [self.base.state[key][moment].view(-1) for key in self._keys()]
        if self.ema is not None:
            kinds["ema"] = self.ema
        return kinds

    def tensors(self) -> Iterator[tuple[Fragment, str, Tensor]]:
        """Every fragment of every kind, as views that may be read and written. Running statistics are whole on every rank
        (``flat`` -1), and their average is themselves."""
        kinds = self.flats_by_kind()
        for fragment in self.fragments:
            for kind, flats in kinds.items():
                yield (
                    fragment,
                    kind,
                    flats[fragment.flat].narrow(0, fragment.start, fragment.length),
                )
        for name, buffer in self.buffers.items():
            for kind in ("master", "ema") if self.ema is not None else ("master",):
                yield (
                    Fragment(name, self.shapes[name], 0, buffer.numel(), -1, 0),
                    kind,
                    buffer.view(-1),
                )

    @torch.no_grad()
    def average_buffers(self) -> None:
        """Collective: running statistics become their mean over the ranks (an update is linear, so when does not matter)."""
        if self.buffers and torch.distributed.get_world_size() > 1:
            together = torch.cat([buffer.view(-1) for buffer in self.buffers.values()])
            torch.distributed.all_reduce(together)
            means = (together / torch.distributed.get_world_size()).split(
                [b.numel() for b in self.buffers.values()]
            )
            torch._foreach_copy_([buffer.view(-1) for buffer in self.buffers.values()], list(means))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Keep |alpha| >= 1e-3 (sign kept, + at 0) on masters and low-precision copies, then average. ``step``: 0-based."""
        for fragment in self.fragments:
            if is_alpha(fragment.name):
                _clamp(self.flats[fragment.flat].narrow(0, fragment.start, fragment.length))
        for name, parameter in self.parameters.items():
            if is_alpha(name):
                if hasattr(parameter, "ds_tensor"):
                    _clamp(parameter.ds_tensor.data)
                if parameter.data.numel():
                    _clamp(parameter.data)
        if self.ema is not None:
            decay = min(
                self.ema_decay, (1 + step) / (10 + step)
            )  # short runs: a shorter memory at first
            torch._foreach_lerp_(self.ema, [flat.detach() for flat in self.flats], 1 - decay)

    @torch.no_grad()
    def smallest_alpha(self) -> list[list[float]]:
        """min |alpha| of every [column][level], over all ranks (synchronises)."""
        spec = self.engine.module.spec
        smallest = torch.full((spec.columns, 4), torch.inf)
        for fragment in self.fragments:
            if is_alpha(fragment.name):
                _, column, _, level, _ = fragment.name.split(".")
                value = (
                    self.flats[fragment.flat]
                    .narrow(0, fragment.start, fragment.length)
                    .abs()
                    .min()
                    .cpu()
                )
                smallest[int(column), int(level)] = torch.minimum(
                    smallest[int(column), int(level)], value
                )
        torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
        result: list[list[float]] = smallest.tolist()
        return result

    @torch.no_grad()
    def publish(self, values: list[Tensor]) -> None:
        """Make the network compute with ``values`` (flats: the masters or the EMA)."""
        optimizer = self.engine.optimizer
        if self.stage == 0:
            for flat, value in zip(self.flats, values, strict=True):
                flat.copy_(value)
        elif self.stage == 3:
            optimizer.parameter_offload.partition_all_parameters()
            for fragment in self.fragments:
                target = self.parameters[fragment.name].ds_tensor.data[: fragment.length]
                target.copy_(values[fragment.flat].narrow(0, fragment.start, fragment.length))
        else:
            rank = torch.distributed.get_rank()
            for i, value in enumerate(values):
                share = optimizer.parallel_partitioned_bit16_groups[i][rank]
                share.data.copy_(value)
                torch.distributed.all_gather_into_tensor(
                    optimizer.bit16_groups_flat[i].data, share.data.clone()
                )

    def use_ema(self) -> None:
        """Compute with the averaged weights until ``use_masters`` (does nothing without an EMA)."""
        if self.ema is not None:
            self._backup = [flat.detach().clone() for flat in self.flats] if self.stage == 0 else []
            self.publish(self.ema)

    def use_masters(self) -> None:
        """Compute with the masters again."""
        if self.ema is not None:
            self.publish(self._backup if self.stage == 0 else self.flats)
            self._backup = []


def _clamp(alpha: Tensor) -> None:
    alpha.copy_(
        torch.where(alpha >= 0, alpha.clamp(min=ALPHA_LIMIT), alpha.clamp(max=-ALPHA_LIMIT))
    )
