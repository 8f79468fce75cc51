"""Values that follow from a job: what left-out keys come to."""

from __future__ import annotations

from pipeline.config.schema import EvaluateStage, ExportStage, Job, PrepareStage, TrainConfig
from pipeline.errors import ConfigError

TRAINING = ("pretrain", "finetune")
ORDER = ("prepare", "pretrain", "finetune", "evaluate", "export")


def stage_names(job: Job) -> list[str]:
    """The stages that the job has, in the order in which they run."""
    return [name for name in ORDER if getattr(job.stages, name) is not None]


def stage_config(job: Job, stage: str) -> PrepareStage | TrainConfig | EvaluateStage | ExportStage:
    """The section of a stage. Raises ConfigError if the job has no such stage."""
    config: PrepareStage | TrainConfig | EvaluateStage | ExportStage | None = getattr(
        job.stages, stage, None
    )
    if config is None:
        names = ", ".join(stage_names(job)) or "none"
        raise ConfigError(
            f"the job has no stage '{stage}'",
            place=f"stages.{stage}",
            remedy=f"its stages: {names}",
        )
    return config


def train_config(job: Job, stage: str) -> TrainConfig:
    """The section of a training stage. Raises ConfigError if the job has no such stage."""
    config = stage_config(job, stage)
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"'{stage}' is not a training stage",
            place=f"stages.{stage}",
            remedy="pretrain or finetune",
        )
    return config


def source_stage(job: Job, stage: str) -> str:
    """The training stage of this job whose weights ``stage`` starts from; '' for none, or for a weights file."""
    initial = getattr(stage_config(job, stage), "initial", "")
    return initial if initial in TRAINING else ""


def dataset_name(job: Job, stage: str) -> str:
    """The dataset of a stage: its own `data`, else that of the stage in `from`, else the job's only one. Raises ConfigError."""
    name = getattr(stage_config(job, stage), "data", "")
    if isinstance(name, str) and name:
        return name
    source = source_stage(job, stage) if stage not in TRAINING else ""
    if source and getattr(job.stages, source) is not None:
        return dataset_name(job, source)
    if len(job.data) == 1:
        return next(iter(job.data))
    raise ConfigError(
        f"the job has {len(job.data)} datasets: it must be said which",
        place=f"stages.{stage}.data",
        remedy=f"data: one of {', '.join(job.data)}",
    )


def prepared_names(job: Job) -> list[str]:
    """The datasets that the prepare stage makes."""
    if job.stages.prepare is None:
        return []
    return list(job.stages.prepare.data or job.data)


def batches(train: TrainConfig, world_size: int) -> tuple[int, int]:
    """(micro_batch, accumulation) such that world_size * micro_batch * accumulation == global_batch. Raises ConfigError."""
    if train.global_batch % world_size:
        low = train.global_batch - train.global_batch % world_size
        near = " or ".join(str(size) for size in (low, low + world_size) if size)
        cause = f"{train.global_batch} images cannot be shared evenly by {world_size} processes"
        raise ConfigError(cause, place="global_batch", remedy=f"take {near}")
    share = train.global_batch // world_size
    micro = share if train.micro_batch == "auto" else train.micro_batch
    if share % micro:
        near = ", ".join(
            str(size) for size in range(1, share + 1) if share % size == 0 and size <= 2 * micro
        )
        raise ConfigError(
            f"a process's share of {share} images (global_batch {train.global_batch} / {world_size}) is not a multiple of "
            f"micro_batch {micro}",
            place="micro_batch",
            remedy=f"take one of {near}",
        )
    return micro, share // micro


def steps_per_epoch(train: TrainConfig, images: int) -> int:
    """Optimizer steps of an epoch on ``images`` training images, each shown ``repeats`` times (balanced: on average); the
    last, incomplete batch is dropped."""
    return images * train.repeated_augmentation // train.global_batch


def steps(train: TrainConfig, images: int) -> int:
    """Optimizer steps of a stage on ``images`` training images."""
    total = train.epochs * steps_per_epoch(train, images)
    return min(total, train.max_steps) if train.max_steps is not None else total


def evaluate_image_size(job: Job) -> int:
    """Side of the evaluated image (pixels). Raises ConfigError where neither the stage nor its `from` tells it."""
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
        remedy="give it",
    )
