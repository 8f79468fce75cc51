"""The DeepSpeed engine of a training stage."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

import torch

from pipeline.config.schema import TrainConfig
from pipeline.model import Network, NetworkSpec
from pipeline.model.column import Level
from pipeline.train.optim import adamw
from pipeline.train.world import World

TIMEOUT = timedelta(minutes=30)


def setup_process(world: World, use_cuda: bool, threads: int) -> torch.device:
    """Device, threads and process group of this process. Missing coordinates mean a single process."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if world.size == 1 and "MASTER_PORT" not in os.environ:
        defaults["MASTER_PORT"] = str(_free_port())
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("DS_BUILD_OPS", "0")
    if not use_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_SIZE", str(world.size))
        torch.set_num_threads(threads)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    device = torch.device("cuda", world.local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend, timeout=TIMEOUT)
    deepspeed.init_distributed("nccl" if use_cuda else "gloo", verbose=False)
    return device


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def deepspeed_config(config: TrainConfig, world_size: int, micro_batch: int, largest_level: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. ``largest_level``: parameters of the largest level of a column (ZeRO-3's grain:
    what the recompute gathers is used by the same level's backward at once, so it is not gathered a third time)."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
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


def _largest_level(model: Network) -> int:
    levels = [module for module in model.modules() if isinstance(module, Level)]
    return max(sum(getattr(p, "ds_numel", p.numel()) for p in level.parameters()) for level in levels)


def make_engine(
    spec: NetworkSpec, config: TrainConfig, world: World, micro_batch: int, seed: int, device: torch.device
) -> Any:
    """A DeepSpeed engine around a freshly initialised network, the same on every rank for the same ``seed``."""
    import deepspeed

    torch.manual_seed(seed)
    if config.zero_stage == 3:
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        draft = deepspeed_config(config, world.size, micro_batch, 1)
        with deepspeed.zero.Init(config_dict_or_path=draft, dtype=dtype):
            model = Network(spec)
    else:
        model = Network(spec).to(device)
    model.compute_in(torch.bfloat16 if config.precision == "bf16" else None)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=adamw(model, config),
        config=deepspeed_config(config, world.size, micro_batch, _largest_level(model)),
    )
    return engine
