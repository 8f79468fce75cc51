"""A small network under DeepSpeed, stepped by hand in each process of a group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pipeline.config.schema import TrainConfig
from pipeline.model import Activations, NetworkSpec
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.process_group import process_group
from pipeline.train.checkpointing import restore, save_checkpoint
from pipeline.train.engine import make_engine
from pipeline.train.loss import compound_terms
from pipeline.train.optimizer import set_rate
from pipeline.train.zero_state import ShardedState
from tests.model.reference import as_reference

SPEC = NetworkSpec(
    (8, 16, 24, 32), (1, 1, 2, 1), 4, 7, huge=True, supervised=True, activations="stored"
)
BATCH, SIZE = 8, 32


@dataclass(frozen=True)
class Options:
    """``poison``: the step at which rank 0's images are not finite. ``reference``: the stored evaluation of the exact
    columns' arithmetic instead of the model's own. ``fp16``: False simulates a CPU without fp16 arithmetic (no avx512_fp16)."""

    root: Path
    stage: int
    precision: Any = "fp32"
    activations: Activations = "exact"
    steps: int = 4
    accumulation: int = 1
    poison: int = -1
    reference: bool = False
    fp16: bool = True


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator)
    return images * 2 - 1, images, torch.randint(0, 7, (BATCH,), generator=generator)


def gathered_now(engine: Any) -> int:
    return sum(p.ds_numel for p in engine.module.parameters() if p.ds_status.name == "AVAILABLE")


def count_gathered(engine: Any, result: dict[str, Any]) -> None:
    """Elements that ZeRO-3 gathers a step, as multiples of all parameters, to ``result["gathered"]``; and how many of later
    columns' are there when column 0 is computed again to ``result["gathered_late"]``."""
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    name = "_PartitionedParameterCoordinator__all_gather_params_"
    gather, total = getattr(coordinator, name), sum(p.ds_numel for p in engine.module.parameters())

    def counting(params: Any, *arguments: Any, **options: Any) -> Any:
        fetched = sum(p.ds_numel for p in params if p.ds_status.name == "NOT_AVAILABLE")
        result["gathered"][-1] += fetched / total
        return gather(params, *arguments, **options)

    setattr(coordinator, name, counting)
    later = [p for column in engine.module.columns[1:] for p in column.parameters()]

    def look(module: Any, inputs: Any) -> None:
        if torch.is_grad_enabled():  # the recompute
            late = sum(p.ds_numel for p in later if p.ds_status.name == "AVAILABLE")
            result["gathered_late"] = max(result["gathered_late"], late)

    engine.module.columns[0].levels[0].register_forward_pre_hook(look)


def steps(options: Options) -> dict[str, Any]:
    """From the newest checkpoint to ``options.steps``, then a checkpoint; what happened on the way."""
    torch.use_deterministic_algorithms(True)
    if not options.fp16:
        get_accelerator().is_fp16_supported = lambda: False
    world = DistEnv.from_environment()
    config = TrainConfig(
        epochs=1,
        base_lr=1e-3,
        base_lr_batch=BATCH,
        global_batch=BATCH,
        micro_batch=BATCH // world.size // options.accumulation,
        precision=options.precision,
        zero_stage=options.stage,
        clip_grad=1.0,
        ema_decay=0.9,
        weight_decay=0.05,
    )
    with process_group(world, use_cuda=False, threads=1) as device:
        assert isinstance(config.micro_batch, int)
        spec = replace(SPEC, activations=options.activations)
        engine = make_engine(spec, config, world, config.micro_batch, 3, device)
        if options.reference:
            as_reference(engine.module)
        masters = ShardedState(engine, config.ema_decay)
        said: list[str] = []
        manifest = restore(
            options.root, masters, {"test": 1}, lambda text, level="info": said.append(text)
        )
        start = manifest.step if manifest else 0
        result: dict[str, Any] = {
            "losses": [],
            "said": said,
            "mismatched": 0,
            "gathered_after": 0,
            "gathered_late": 0,
            "gathered": [],
            "applied": [],
        }
        if options.stage == 3 and options.activations == "exact":
            count_gathered(engine, result)
        for step in range(start, options.steps):
            result["losses"].append(
                _step(engine, masters, options, config.micro_batch, step, result)
            )
        state = {"identity": {"test": 1}, "optimizer_steps": options.steps}
        assert save_checkpoint(options.root, masters, options.steps, state, 3, lambda: True) is None
        with torch.no_grad():
            masters.use_ema()
            result["averaged"] = float(engine.module(batch(0)[0]).logits[-1].double().sum())
            masters.use_masters()
    return result


def _step(
    engine: Any,
    masters: ShardedState,
    options: Options,
    share: int,
    step: int,
    result: dict[str, Any],
) -> float:
    rank, world = dist.get_rank(), dist.get_world_size()
    set_rate(engine.optimizer.param_groups, 1e-3)
    result["gathered"].append(0.0)
    total = torch.zeros(())
    for part in range(options.accumulation):
        begin = (rank * options.accumulation + part) * share
        images, pixels, labels = (tensor[begin : begin + share] for tensor in batch(step))
        if rank == 0 and step == options.poison:
            images = images / 0
        loss = compound_terms(engine(images, None), pixels, labels).total
        engine.backward(loss)
        result["mismatched"] += int(engine.module.consistency.mismatched_elements)
        engine.step()
        total += loss.detach() / options.accumulation
    result["applied"].append(bool(engine.was_step_applied()))
    if result["applied"][-1]:
        masters.after_step(step)
    if options.stage == 3:
        result["gathered_after"] = max(result["gathered_after"], gathered_now(engine))
    dist.all_reduce(total)
    return float(total) / world
