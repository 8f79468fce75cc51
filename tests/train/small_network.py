"""A small network under DeepSpeed, stepped by hand in each process of a group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pipeline.checkpoint.background import BackgroundWriter
from pipeline.checkpoint.manifest import directory_of
from pipeline.checkpoint.retention import Retention
from pipeline.config.schema import ClusterConfig, TrainConfig
from pipeline.model import Activations, NetworkSpec
from pipeline.optimizers import registry
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.process_group import process_group
from pipeline.train.alpha_clamp import clamp_alpha
from pipeline.train.checkpointing import owned_ranges, restore
from pipeline.train.ema import ema_update, ema_weights
from pipeline.train.engine import DeepSpeedEngine, make_engine
from pipeline.train.loss import compound_terms
from pipeline.train.loss_scale import LossScale
from pipeline.train.offload import allocator
from pipeline.train.optimizer import set_learning_rate
from pipeline.train.training_state import TrainingState
from pipeline.train.zero_state import ShardedState
from tests.model.reference import as_reference

SPEC = NetworkSpec(
    channels=(8, 16, 24, 32),
    depths=(1, 1, 2, 1),
    columns=4,
    num_classes=7,
    huge=True,
    supervised=True,
    activations="stored",
)
BATCH = 8
SIZE = 32
SEED = 3
EMA_DECAY = 0.9
IDENTITY: dict[str, object] = {"test": 1}
ONE_THREAD = ClusterConfig(device="cpu", threads=1)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a group trains the network.

    ``nonfinite_step``: the step at which rank 0's images are not finite. ``reference``: compute the
    exact columns' arithmetic with everything stored. ``fp16``: False simulates a CPU without fp16
    arithmetic (no avx512_fp16).
    """

    checkpoints: Path
    stage: int
    precision: Any = "fp32"
    activations: Activations = "exact"
    steps: int = 4
    accumulation: int = 1
    nonfinite_step: int = -1
    reference: bool = False
    optimizer: str = "adamw"
    offload: str = "none"
    fp16: bool = True
    spec: NetworkSpec = SPEC


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The global batch of a step: normalised images, images in [0, 1], labels."""
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator)
    return images * 2 - 1, images, torch.randint(0, 7, (BATCH,), generator=generator)


def available_elements(parameters: Any) -> int:
    """Elements of the parameters that ZeRO-3 has gathered and not released."""
    return sum(p.ds_numel for p in parameters if p.ds_status.name == "AVAILABLE")


def count_gathered(engine: Any, result: dict[str, Any]) -> None:
    """Watch what ZeRO-3 gathers.

    ``result["gathered"]``: elements gathered per step, as multiples of all parameters.
    ``result["gathered_late"]``: elements of later columns that are still gathered when column 0 is
    computed again.
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    name = "_PartitionedParameterCoordinator__all_gather_params_"
    gather = getattr(coordinator, name)
    total = sum(p.ds_numel for p in engine.module.parameters())

    def counting(params: Any, *arguments: Any, **options: Any) -> Any:
        fetched = sum(p.ds_numel for p in params if p.ds_status.name == "NOT_AVAILABLE")
        result["gathered"][-1] += fetched / total
        return gather(params, *arguments, **options)

    setattr(coordinator, name, counting)
    later = [p for column in engine.module.columns[1:] for p in column.parameters()]

    def count_late(module: Any, inputs: Any) -> None:
        if torch.is_grad_enabled():  # the recompute
            result["gathered_late"] = max(result["gathered_late"], available_elements(later))

    engine.module.columns[0].levels[0].register_forward_pre_hook(count_late)


def train_config(options: Options, world_size: int) -> TrainConfig:
    return TrainConfig(
        epochs=1,
        base_lr=1e-3,
        base_lr_batch=BATCH,
        global_batch=BATCH,
        micro_batch=BATCH // world_size // options.accumulation,
        precision=options.precision,
        zero_stage=options.stage,
        clip_grad=1.0,
        ema_decay=EMA_DECAY,
        weight_decay=0.05,
        optimizer=options.optimizer,
        offload_optimizer=options.offload,
    )


def steps(options: Options) -> dict[str, Any]:
    """Train from the newest checkpoint to ``options.steps`` and write a checkpoint; a report."""
    torch.use_deterministic_algorithms(True)
    if not options.fp16:
        get_accelerator().is_fp16_supported = lambda: False
    dist_env = DistEnv.from_environment()
    config = train_config(options, dist_env.size)
    with process_group(dist_env, ONE_THREAD) as device:
        assert isinstance(config.micro_batch, int)
        spec = replace(options.spec, activations=options.activations)
        engine = make_engine(
            spec, config, dist_env, micro_batch=config.micro_batch, seed=SEED, device=device
        )
        if options.reference:
            as_reference(engine.module)
        moments = registry.kind(options.optimizer).moments
        state = ShardedState(
            engine, moments=moments, with_ema=True, allocate=allocator(options.offload)
        )
        log: list[str] = []
        restored = restore(
            options.checkpoints, state, IDENTITY, lambda text, level="info": log.append(text)
        )
        scale = LossScale(engine)
        if restored is not None:
            scale.restore(restored.state.loss_scale)
        result: dict[str, Any] = {
            "losses": [],
            "log": log,
            "mismatched": 0,
            "gathered_after": 0,
            "gathered_late": 0,
            "gathered": [],
            "applied": [],
        }
        if options.stage == 3 and options.activations == "exact":
            count_gathered(engine, result)
        for step in range(restored.step if restored else 0, options.steps):
            loss = _step(engine, state, options, share=config.micro_batch, step=step, result=result)
            result["losses"].append(loss)
        loop = TrainingState(
            identity=IDENTITY, applied_steps=options.steps, loss_scale=scale.state()
        )
        save(options.checkpoints, state, loop)
        with torch.no_grad(), ema_weights(state):
            result["averaged"] = float(engine.module(batch(0)[0]).logits[-1].double().sum())
    return result


def save(checkpoints: Path, state: ShardedState, loop: TrainingState) -> None:
    """Write a checkpoint after the last step."""
    writer = BackgroundWriter(pin_memory=False, may_commit=lambda: True)
    target = directory_of(checkpoints, loop.applied_steps)
    writer.start(target, owned_ranges(state), loop.to_json(), Retention(last=3))
    writer.wait()
    (report,) = writer.reports()
    assert report.failure is None


def _step(
    engine: DeepSpeedEngine,
    state: ShardedState,
    options: Options,
    *,
    share: int,
    step: int,
    result: dict[str, Any],
) -> float:
    """One optimizer step on this rank's ``share`` images per micro-batch; the mean loss."""
    rank = dist.get_rank()
    set_learning_rate(engine.optimizer.param_groups, 1e-3)
    result["gathered"].append(0.0)
    total = torch.zeros(())
    for part in range(options.accumulation):
        begin = (rank * options.accumulation + part) * share
        images, pixels, labels = (tensor[begin : begin + share] for tensor in batch(step))
        if rank == 0 and step == options.nonfinite_step:
            images = images / 0
        loss = compound_terms(engine(images, None), pixels, labels).total
        engine.backward(loss)
        result["mismatched"] += int(engine.module.consistency.mismatched_elements)
        engine.step()
        total += loss.detach() / options.accumulation
    applied = bool(engine.was_step_applied())
    result["applied"].append(applied)
    if applied:
        clamp_alpha(state)
        ema_update(state, EMA_DECAY, step)
    if options.stage == 3:
        after = available_elements(engine.module.parameters())
        result["gathered_after"] = max(result["gathered_after"], after)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()
