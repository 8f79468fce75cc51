"""The DeepSpeed engine of a training stage: its configuration, its construction, its interface."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.config.schema import TrainConfig
from pipeline.errors import StageError
from pipeline.model import Network, NetworkSpec, Output
from pipeline.model.column import Level
from pipeline.runtime import environment
from pipeline.runtime.dist_env import DistEnv
from pipeline.train.offload import combine_norms_as_on_device
from pipeline.train.optimizer import make_optimizer

_COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
SMALLEST_LOSS_SCALE = 1
REDUCE_BUCKET = 500_000_000  # elements: DeepSpeed's default


class DeepSpeedEngine(Protocol):
    """The members of a DeepSpeed engine that this pipeline uses."""

    module: Network
    optimizer: Any  # a torch optimizer under ZeRO 0, DeepSpeed's wrapper of one under ZeRO 1 to 3
    micro_steps: int  # micro-batches so far; decides which call of ``step`` ends a step

    def __call__(self, images: Tensor, uniforms: Tensor | None = None) -> Output: ...

    def backward(self, loss: Tensor) -> object: ...

    def step(self) -> object: ...

    def train(self) -> object: ...

    def eval(self) -> object: ...

    def was_step_applied(self) -> bool:
        """False if the last update was skipped because its gradients were not finite."""

    def get_global_grad_norm(self) -> float | None: ...

    def zero_optimization_stage(self) -> int: ...

    def train_micro_batch_size_per_gpu(self) -> int: ...


@contextlib.contextmanager
def warnings_off() -> Iterator[None]:
    """DeepSpeed logs errors only inside the block: for an overflow that is made on purpose."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _import_deepspeed(dist_env: DistEnv, device: torch.device) -> ModuleType:
    """Import DeepSpeed and let it use the process group that exists already."""
    # 1. The environment, before the import. What the launcher has set stays.
    defaults = environment.deepspeed_import(device.type) | environment.rank_of_group(
        dist_env.rank, dist_env.size, dist_env.local_rank, dist_env.local_size
    )
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if dist_env.device is not None:
        # DeepSpeed takes LOCAL_RANK for the index of its device. It is 0 for every process of a
        # machine where Ray shows each its own GPU only.
        os.environ["LOCAL_RANK"] = str(dist_env.device_index)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    # 2. On a CPU, DeepSpeed compiles this extension at the first start, although only inference
    #    needs it. A process killed during the compilation leaves a lock on which all later ones
    #    hang. On a GPU nothing compiles it, and access to this table would look for the CUDA
    #    toolkit once per operator: a second and several warnings per rank.
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # 3. DeepSpeed finds the initialised group of torch.distributed and wraps it.
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    module: ModuleType = deepspeed
    return module


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without torch's compilers.

    DeepSpeed asks of every optimizer whether it is Muon, and therefore imports it. The import wraps
    Muon's functions by torch.compile, which imports torch's compilers: a quarter of the time that a
    process takes to its first step. None of these functions is ever called here.
    """
    from deepspeed.runtime import compiler

    compile_of_deepspeed = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_of_deepspeed


def deepspeed_config(
    config: TrainConfig,
    *,
    world_size: int,
    micro_batch: int,
    parameters: int,
    largest_level: int,
) -> dict[str, Any]:
    """DeepSpeed's own configuration for a training stage.

    Args:
        parameters: of the whole network; no communication buffer needs to hold more.
        largest_level: parameters of the largest level of any column.
    """
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": min(parameters, REDUCE_BUCKET),
    }
    if config.zero_stage == 3:
        # ZeRO-3 gathers one level at a time. The reversible backward pass computes a level again
        # and differentiates it at once, so the level must stay gathered in between: a reuse
        # distance just above the largest level keeps it. Without that, each level would be
        # gathered three times per step (forward, recompute, backward) instead of twice.
        zero |= {
            "stage3_max_reuse_distance": largest_level + 1,
            "stage3_prefetch_bucket_size": largest_level,
            "stage3_max_live_parameters": 4 * largest_level,
            "stage3_param_persistence_threshold": 0,
        }
    if config.offload_optimizer != "none":
        # Page-locked memory, where there is a GPU that copies to it.
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_initialized()}
    settings: dict[str, Any] = {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.global_batch // (world_size * micro_batch),
        "gradient_clipping": config.clip_grad,
        "steps_per_print": 10**9,  # never: the pipeline logs by itself
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16", "min_loss_scale": SMALLEST_LOSS_SCALE},
        "zero_optimization": zero,
        # DeepSpeed's own throughput timer waits for the device twice per micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    # By default, gradients accumulate in the dtype of the network. A bf16 sum of 32 micro-batches
    # is off by almost 1%, because each addition keeps 8 significant bits. Under ZeRO-1 with bf16
    # the setting would select DeepSpeed's BF16_Optimizer, whose state is laid out differently; the
    # configuration check refuses accumulation there, so nothing is added up in 16 bits.
    if config.zero_stage != 1:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _parameter_count(module: nn.Module) -> int:
    # Under ZeRO-3 a partitioned parameter is empty; ``ds_numel`` is its real size.
    return sum(
        getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters()
    )


def make_engine(
    spec: NetworkSpec,
    config: TrainConfig,
    dist_env: DistEnv,
    *,
    micro_batch: int,
    seed: int,
    device: torch.device,
) -> DeepSpeedEngine:
    """Build a network and its DeepSpeed engine.

    The initial weights depend on ``seed`` only, so they are the same on every rank.
    """
    deepspeed = _import_deepspeed(dist_env, device)
    _import_muon_uncompiled()
    if (
        config.precision == "fp16"
        and not deepspeed.accelerator.get_accelerator().is_fp16_supported()
    ):
        raise StageError(
            "this processor cannot compute in fp16", remedy="precision: bf16, or train on a GPU"
        )
    torch.manual_seed(seed)
    if config.zero_stage == 3:
        # The sizes do not matter yet: this configuration is only for partitioning.
        partitioning = deepspeed_config(
            config,
            world_size=dist_env.size,
            micro_batch=micro_batch,
            parameters=1,
            largest_level=1,
        )
        # Without ``dtype``: given one, DeepSpeed 0.19.8 ignores it and takes bf16 on every device
        # that lacks fp16 arithmetic (`dtype or fp16 if fp16 is supported else bf16`). Without it,
        # DeepSpeed follows the configuration.
        with deepspeed.zero.Init(config_dict_or_path=partitioning):
            model = Network(spec)
    else:
        model = Network(spec).to(device)
    model.compute_in(_COMPUTE_DTYPES[config.precision])
    levels = [module for module in model.modules() if isinstance(module, Level)]
    settings = deepspeed_config(
        config,
        world_size=dist_env.size,
        micro_batch=micro_batch,
        parameters=_parameter_count(model),
        largest_level=max(map(_parameter_count, levels)),
    )
    engine: DeepSpeedEngine
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=make_optimizer(model, config), config=settings
    )
    if config.offload_optimizer != "none":
        combine_norms_as_on_device(engine.optimizer)
    return engine
