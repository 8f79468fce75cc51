"""Values that follow from a job: what optional keys stand for if they are absent."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.schema import (
    EvaluateStage,
    ExportStage,
    Job,
    PrepareStage,
    TrainConfig,
    hparam_keys,
)
from pipeline.errors import ConfigError
from pipeline.layout import RunDir

TRAINING = ("pretrain", "finetune")
ORDER = ("prepare", "pretrain", "finetune", "evaluate", "export")


def stage_names(job: Job) -> list[str]:
    """The stages of the job, in the order in which they run."""
    return [name for name in ORDER if getattr(job.stages, name) is not None]


def training_stages(job: Job) -> list[str]:
    """The training stages of the job, in the order in which they run."""
    return [name for name in stage_names(job) if name in TRAINING]


def stage_config(job: Job, stage: str) -> PrepareStage | TrainConfig | EvaluateStage | ExportStage:
    """The section of a stage.

    Raises:
        ConfigError: the job has no such stage.
    """
    config: PrepareStage | TrainConfig | EvaluateStage | ExportStage | None = getattr(
        job.stages, stage, None
    )
    if config is None:
        cause = f"the job has no stage '{stage}'"
        remedy = f"its stages: {', '.join(stage_names(job)) or 'none'}"
        raise ConfigError(cause, place=f"stages.{stage}", remedy=remedy)
    return config


def train_config(job: Job, stage: str) -> TrainConfig:
    """The section of a training stage.

    Raises:
        ConfigError: the job has no such stage, or it does not train.
    """
    config = stage_config(job, stage)
    if not isinstance(config, TrainConfig):
        cause = f"'{stage}' is not a training stage"
        raise ConfigError(cause, place=f"stages.{stage}", remedy="pretrain or finetune")
    return config


def source_stage(job: Job, stage: str) -> str:
    """The training stage whose weights ``stage`` starts from; '' for none or a weights file."""
    initial = getattr(stage_config(job, stage), "initial", "")
    return initial if initial in TRAINING else ""


def dataset_name(job: Job, stage: str) -> str:
    """The dataset of a stage: its own `data`, else that of its `from` stage, else the only one.

    Raises:
        ConfigError: none of these applies.
    """
    name = getattr(stage_config(job, stage), "data", "")
    if isinstance(name, str) and name:
        return name
    # Fine-tuning does not inherit the dataset of pretraining: the two usually differ.
    source = source_stage(job, stage) if stage not in TRAINING else ""
    if source and getattr(job.stages, source) is not None:
        return dataset_name(job, source)
    if len(job.data) == 1:
        return next(iter(job.data))
    raise ConfigError(
        f"the job has {len(job.data)} datasets: choose one",
        place=f"stages.{stage}.data",
        remedy=f"data: one of {', '.join(job.data)}",
    )


def hyperparameters(job: Job, stage: str) -> dict[str, str | float | bool]:
    """The hyperparameters of a training stage that TensorBoard shows, in their order.

    Raises:
        ConfigError: the job has no such stage, or it does not train.
    """
    config = train_config(job, stage)
    model = job.model
    return {
        **{key: getattr(config, key) for key in hparam_keys(TrainConfig)},
        "channels": str(model.channels),
        "columns": model.columns,
        "drop_path": drop_path(job, config),
    }


def drop_path(job: Job, config: TrainConfig) -> float:
    """The rate of stochastic depth in a training stage: its own, else the model's."""
    return job.model.drop_path if config.drop_path is None else config.drop_path


def prepared_names(job: Job) -> list[str]:
    """The datasets that the prepare stage creates."""
    if job.stages.prepare is None:
        return []
    names = job.stages.prepare.data or job.data
    return [name for name in names if name not in job.data or not job.data[name].prepared]


def dataset_place(job: Job, run_dir: RunDir, name: str) -> Path | str:
    """Where a prepared dataset lies: in the run directory, or the folder or URL of `prepared`."""
    prepared = job.data[name].prepared if name in job.data else ""
    if not prepared:
        return run_dir.dataset(name)
    return prepared if "://" in prepared else Path(prepared)


def batches(train: TrainConfig, world_size: int) -> tuple[int, int]:
    """Micro-batch (images) and accumulation steps of each process.

    world_size x micro_batch x accumulation == global_batch, always. Examples for global_batch 4096:

        64 processes, micro_batch auto   4096 / 64 = 64 images per process    (64, 1)
        64 processes, micro_batch 16     64 images in 4 passes of 16          (16, 4)
        64 processes, micro_batch 24     64 is not a multiple of 24           ConfigError
        60 processes                     4096 is not a multiple of 60         ConfigError

    Raises:
        ConfigError: the batch cannot be divided like this; its remedy names sizes that can.
    """
    # Shares must be equal: 4096 images on 60 processes would be 68.27 each.
    if train.global_batch % world_size:
        low = train.global_batch - train.global_batch % world_size
        near = " or ".join(str(size) for size in (low, low + world_size) if size)
        cause = f"{train.global_batch} images cannot be shared evenly by {world_size} processes"
        raise ConfigError(cause, place="global_batch", remedy=f"take {near}")
    # The gradient is the mean over processes and micro-batches. It equals the mean over the global
    # batch only if all of them have the same number of images.
    share = train.global_batch // world_size
    micro = share if train.micro_batch == "auto" else train.micro_batch
    if share % micro:
        # Suggest divisors up to twice the wanted size: 24 of 64 -> 1, 2, 4, 8, 16, 32.
        divisors = [size for size in range(1, share + 1) if share % size == 0]
        near = ", ".join(str(size) for size in divisors if size <= 2 * micro)
        cause = (
            f"a process's share of {share} images (global_batch {train.global_batch} / "
            f"{world_size}) is not a multiple of micro_batch {micro}"
        )
        raise ConfigError(cause, place="micro_batch", remedy=f"take one of {near}")
    return micro, share // micro


def steps_per_epoch(train: TrainConfig, images: int) -> int:
    """Optimizer steps per epoch on ``images`` training images.

    Repeated augmentation shows each image several times (with class balancing: on average). The
    last, incomplete batch is dropped. Example: 1000 images, 2 repeats, batch 64 -> 2000 // 64 = 31.
    """
    return images * train.repeated_augmentation // train.global_batch


def steps(train: TrainConfig, images: int) -> int:
    """Optimizer steps of a whole stage on ``images`` training images."""
    total = train.epochs * steps_per_epoch(train, images)
    return min(total, train.max_steps) if train.max_steps is not None else total


def evaluate_image_size(job: Job) -> int:
    """Side of the evaluation image (pixels): that of the stage, else of its `from` stage.

    Raises:
        ConfigError: the stage has no image_size, and its `from` is not a stage of this job.
    """
    stage = stage_config(job, "evaluate")
    assert isinstance(stage, EvaluateStage)
    if stage.image_size is not None:
        return stage.image_size
    source = source_stage(job, "evaluate")
    if source and getattr(job.stages, source) is not None:
        return train_config(job, source).image_size
    raise ConfigError(
        "image_size cannot be derived: `from` is not a stage of this job",
        place="stages.evaluate.image_size",
        remedy="set image_size",
    )
