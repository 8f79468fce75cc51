"""``--rehearse``: the same job, small. Width, images and steps shrink; wiring, depths, columns, recipes, precision, ZeRO and
the order of stages stay, so that what would fail after hours on a cluster fails after seconds on a laptop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.config.check import check
from pipeline.config.job_queries import TRAINING
from pipeline.config.schema import Job
from pipeline.sources.class_lists import class_list

ORIGIN = "rehearse"
SUFFIX = "-rehearsal"
WIDTH = 12  # channels of the finest level
PROCESSES = 2
GLOBAL_BATCH = 16
MICRO_BATCH = 4  # two processes: two micro batches a step
STEPS = 8
IMAGE_SIZES = (64, 96, 128, 160)  # in place of the job's different sizes, ascending
CLASSES = 24
IMAGES_PER_CLASS, VALIDATION_PER_CLASS = 12, 4


class _Changes:
    """The job as plain values, and the keys that a rehearsal changes in it."""

    def __init__(self, job: Job) -> None:
        self.values: dict[str, Any] = job.model_dump(mode="json", by_alias=True)
        self.keys: list[str] = []
        self.notes: list[str] = []

    def set(self, dotted: str, value: Any) -> None:
        *above, last = dotted.split(".")
        section = self.values
        for key in above:
            section = section[key]
        before = section[last]
        if before == value:
            return
        section[last] = value
        below = [f"{dotted}.{key}" for key in value] if isinstance(value, dict) else []
        self.keys += [dotted, *below]
        if not isinstance(value, dict):
            self.notes.append(f"rehearsal: {dotted} {before} -> {value}")

    def job(self) -> Job:
        return Job.model_validate(self.values)


def rehearse(job: Job, origins: Mapping[str, str]) -> tuple[Job, list[str], list[str]]:
    """The rehearsal of a job: (job, changed keys, notes).

    Raises ConfigError for what cannot work in the real job, its sources aside: small, it might work.
    """
    changes = _Changes(job)
    for number, name in enumerate(job.data):
        _dataset(changes, job, name, seed=1 + number)
    for stage in TRAINING:
        section = getattr(job.stages, stage)
        if section is not None and section.initial.endswith(".safetensors"):
            changes.set(f"stages.{stage}.from", "")  # weights of the real width do not fit
    check(changes.job(), 1 if job.cluster.processes == "auto" else job.cluster.processes, origins)
    changes.set("name", job.name[: 64 - len(SUFFIX)] + SUFFIX)
    changes.set("model.channels", narrow(job.model.channels))
    changes.set("cluster.device", "cpu")
    changes.set("cluster.processes", PROCESSES)
    sizes = _sizes(job)
    for stage in TRAINING:
        if getattr(job.stages, stage) is not None:
            _training(changes, job, stage, sizes)
    if job.stages.evaluate is not None and job.stages.evaluate.image_size is not None:
        changes.set("stages.evaluate.image_size", sizes[job.stages.evaluate.image_size])
    return changes.job(), changes.keys, changes.notes


def narrow(channels: Iterable[int]) -> list[int]:
    """Widths in the same proportions, the first at most WIDTH; multiples of 4."""
    widths = list(channels)
    scale = min(1.0, WIDTH / widths[0])
    return [max(4, round(width * scale / 4) * 4) for width in widths]


def _sizes(job: Job) -> dict[int, int]:
    """Small image sizes in the same order as the job's; equal ones stay equal."""
    stages = [job.stages.pretrain, job.stages.finetune, job.stages.evaluate]
    wanted = sorted(
        {stage.image_size for stage in stages if stage is not None and stage.image_size is not None}
    )
    return {
        size: min(size, IMAGE_SIZES[min(rank, len(IMAGE_SIZES) - 1)])
        for rank, size in enumerate(wanted)
    }


def _dataset(changes: _Changes, job: Job, name: str, seed: int) -> None:
    dataset, key = job.data[name], f"data.{name}"
    listed = CLASSES if dataset.classes == "auto" else len(class_list(dataset.classes))
    made_up = {
        "classes": min(CLASSES, listed),
        "images_per_class": IMAGES_PER_CLASS,
        "validation_per_class": VALIDATION_PER_CLASS,
        "min_size": 64,
        "max_size": 128,
        "corrupt_fraction": 0.02,
        "seed": seed,
    }
    changes.notes.append(
        f"rehearsal: data.{name} is made up: {made_up['classes']} classes of {IMAGES_PER_CLASS} + {VALIDATION_PER_CLASS} images"
    )
    changes.set(f"{key}.root", "")
    changes.set(f"{key}.synthetic", made_up)
    if dataset.layout in ("auto", "huggingface"):
        changes.set(f"{key}.layout", "class_tars")
    changes.set(f"{key}.max_rejected", 0.2)
    changes.set(f"{key}.shard_rows", 64)
    changes.set(f"{key}.min_side", min(dataset.min_side, 64))


def _training(changes: _Changes, job: Job, stage: str, sizes: dict[int, int]) -> None:
    train, key = getattr(job.stages, stage), f"stages.{stage}"
    changes.set(f"{key}.image_size", sizes[train.image_size])
    changes.set(f"{key}.epochs", 1)
    changes.set(f"{key}.max_steps", STEPS)
    changes.set(f"{key}.warmup_epochs", min(train.warmup_epochs, 0.2))
    changes.set(f"{key}.global_batch", GLOBAL_BATCH)
    changes.set(
        f"{key}.repeated_augmentation", min(train.repeated_augmentation, 2)
    )  # a divisor of it
    changes.set(f"{key}.micro_batch", MICRO_BATCH)
    changes.set(f"{key}.eval_every_epochs", 1.0)
    changes.set(f"{key}.log_every_steps", 1)
    changes.set(f"{key}.checkpoint_every_steps", STEPS // 2)
