"""The DeepSpeed engine of a training stage."""

from __future__ import annotations

import logging
import os
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pipeline.config.schema import TrainConfig
from pipeline.model import Network, NetworkSpec
from pipeline.model.column import Level
from pipeline.runtime.dist_env import DistEnv
from pipeline.train.optimizer import adamw

REDUCE_BUCKET = 500_000_000  # elements: DeepSpeed's default, made anew each step


def _deepspeed(world: DistEnv, device: torch.device) -> ModuleType:
    """DeepSpeed, joined to the process group that is there."""
    defaults = {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_SIZE": str(world.size),
        "DS_BUILD_OPS": "0",
    }
    if device.type == "cpu":
        defaults["DS_ACCELERATOR"] = "cpu"
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    # Of use for inference only, yet compiled at the first start; a process killed meanwhile leaves a lock that all others
    # would wait for without end.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    module: ModuleType = deepspeed
    return module


def deepspeed_config(
    config: TrainConfig, world_size: int, micro_batch: int, parameters: int, largest_level: int
) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    Args:
        parameters: of the whole network; no buffer need hold more.
        largest_level: parameters of the largest level of a column (ZeRO-3's grain: what the recompute gathers is used by the
            same level's backward at once, so it is not gathered a third time).
    """
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": min(parameters, REDUCE_BUCKET),
    }
    if config.zero_stage == 3:
        zero |= {
            "stage3_max_reuse_distance": largest_level + 1,
            "stage3_prefetch_bucket_size": largest_level,
            "stage3_max_live_parameters": 4 * largest_level,
            "stage3_param_persistence_threshold": 0,
        }
    return {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.global_batch // (world_size * micro_batch),
        "gradient_clipping": config.clip_grad,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": zero,
    }


def _size(module: nn.Module) -> int:
    return sum(
        getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters()
    )


def make_engine(
    spec: NetworkSpec,
    config: TrainConfig,
    world: DistEnv,
    micro_batch: int,
    seed: int,
    device: torch.device,
) -> Any:
    """A DeepSpeed engine around a freshly initialised network, the same on every rank for the same ``seed``."""
    deepspeed = _deepspeed(world, device)
    torch.manual_seed(seed)
    if config.zero_stage == 3:
        draft = deepspeed_config(config, world.size, micro_batch, 1, 1)
        # Without ``dtype``: given one, DeepSpeed 0.19.8 takes bf16 on every device that has no fp16 arithmetic, whatever the
        # argument (`dtype or fp16 if fp16 is supported else bf16`); left out, it follows the configuration.
        with deepspeed.zero.Init(config_dict_or_path=draft):
            model = Network(spec)
    else:
        model = Network(spec).to(device)
    model.compute_in(torch.bfloat16 if config.precision == "bf16" else None)
    largest = max(_size(module) for module in model.modules() if isinstance(module, Level))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=adamw(model, config),
        config=deepspeed_config(config, world.size, micro_batch, _size(model), largest),
    )
    return engine
