"""What 'auto' and left-out keys come to, and what cannot work: the questions that the other rooms ask of a job."""

from pipeline.config.check import check
from pipeline.config.derive import (
    TRAINING,
    batches,
    dataset_name,
    evaluate_image_size,
    prepared_names,
    source_stage,
    stage_config,
    stage_names,
    steps,
    steps_per_epoch,
    train_config,
)
from pipeline.config.machine import cores, device, gpus, loader_threads, threads, world_size

__all__ = [
    "TRAINING",
    "batches",
    "check",
    "cores",
    "dataset_name",
    "device",
    "evaluate_image_size",
    "gpus",
    "loader_threads",
    "prepared_names",
    "source_stage",
    "stage_config",
    "stage_names",
    "steps",
    "steps_per_epoch",
    "threads",
    "train_config",
    "world_size",
]
