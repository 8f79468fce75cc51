"""How many images fit one forward and backward pass of a training stage, and what to do if none.

Worked example: RevCol-H at 224 pixels, global batch 4096 on 8 GPUs of 80 GB: 512 images per GPU.
Their activations alone take 47 GiB if every column is inverted and 478 GiB if all are stored. With
``stored_columns: auto``, 64 images with all columns stored (70 GiB with the state) are the fastest
choice: no column is computed twice, and 64 images keep the GPU as busy as 512 do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pipeline.config.job_queries import dataset_name, train_config
from pipeline.config.memory import StageMemory, stage_memory
from pipeline.config.schema import Job, ModelConfig, TrainConfig
from pipeline.sources.class_lists import class_list

# Pixels per micro-batch from which a larger one gains about 1%: 64 images of 224 pixels.
BUSY_PIXELS = 64 * 224**2
UNKNOWN_CLASSES = 1000  # assumed while only the source knows the classes


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A size of the micro-batch, and what it needs.

    Attributes:
        images: per process.
        stored: columns that can store their activations (with activations 'exact').
        memory: the estimate with ``stored`` columns.
    """

    images: int
    stored: int
    memory: StageMemory


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A training stage on devices of a known size."""

    model: ModelConfig
    train: TrainConfig
    classes: int
    world_size: int
    device_bytes: float

    @property
    def least_stored(self) -> int:
        """Columns that store their activations in any case."""
        if self.model.activations != "exact":
            return 0
        wanted = self.model.stored_columns
        # 'auto' measures a stored column in the first step before it decides.
        return min(self.model.columns, 1 if wanted == "auto" else wanted)

    def memory(self, stored: int) -> StageMemory:
        return stage_memory(
            self.model,
            self.train,
            classes=self.classes,
            world_size=self.world_size,
            stored=stored,
        )

    def of_size(self, images: int) -> MicroBatch | None:
        """A micro-batch of ``images`` with as many stored columns as fit; None if none does."""
        most = self.model.columns if self.model.stored_columns == "auto" else self.least_stored
        for stored in range(most, self.least_stored - 1, -1):
            memory = self.memory(stored)
            if memory.fits(images, self.device_bytes):
                return MicroBatch(images=images, stored=stored, memory=memory)
        return None

    def best(self) -> MicroBatch | None:
        """The size that 'auto' stands for; None if not even the smallest one fits."""
        fitting = [choice for size in self.sizes() if (choice := self.of_size(size)) is not None]
        if not fitting or self.model.stored_columns != "auto":
            return fitting[-1] if fitting else None
        # A stored column saves a third of its time, images beyond BUSY_PIXELS almost nothing.
        busy = [
            choice for choice in fitting if choice.images * self.train.image_size**2 >= BUSY_PIXELS
        ]
        if not busy:
            return fitting[-1]
        stored = max(choice.stored for choice in busy)
        return [choice for choice in busy if choice.stored == stored][-1]

    def sizes(self) -> list[int]:
        """Divisors of a process's share, ascending; even ones if images are mixed in pairs."""
        share = self.train.global_batch // self.world_size
        paired = self.train.augment.mixup or self.train.augment.cutmix
        return [
            size for size in range(1, share + 1) if share % size == 0 and not (paired and size % 2)
        ]


def stage_plan(job: Job, stage: str, world_size: int, device_bytes: float) -> StagePlan:
    """The plan of a training stage.

    Raises:
        ConfigError: the stage's dataset or its class list cannot be found.
    """
    dataset = job.data.get(dataset_name(job, stage))
    classes = UNKNOWN_CLASSES
    if dataset is not None and dataset.classes != "auto":
        classes = len(class_list(dataset.classes))
    elif dataset is not None and dataset.synthetic is not None:
        classes = dataset.synthetic.classes
    return StagePlan(
        model=job.model,
        train=train_config(job, stage),
        classes=classes,
        world_size=world_size,
        device_bytes=device_bytes,
    )


def remedy(plan: StagePlan) -> str:
    """Changes of the job after which its smallest micro-batch fits, as text for the user."""
    best = plan.best()
    if best is not None:
        return f"micro_batch: auto (it takes {best.images})"
    texts = [text for text, changed in _alternatives(plan).items() if changed().best() is not None]
    return " or ".join(texts) or "more or larger GPUs, or a smaller model"


def _alternatives(plan: StagePlan) -> Mapping[str, Callable[[], StagePlan]]:
    """Single changes that need less memory, by their text."""
    smaller = plan.train.image_size // 64 * 32
    alternatives = {
        "zero_stage: 2": lambda: _training(plan, zero_stage=max(2, plan.train.zero_stage)),
        "zero_stage: 3 without compile": lambda: _training(plan, zero_stage=3),
        "precision: bf16": lambda: _training(
            plan, precision="bf16", zero_stage=max(2, plan.train.zero_stage)
        ),
        "activations: exact with stored_columns: 0": lambda: replace(
            plan,
            model=plan.model.model_copy(update={"activations": "exact", "stored_columns": 0}),
        ),
    }
    clusters = (replace(plan, world_size=plan.world_size * factor) for factor in (2, 4, 8, 16))
    enough = next((larger for larger in clusters if larger.best() is not None), None)
    if enough is not None:
        alternatives[f"{enough.world_size} GPUs"] = lambda: enough
    if smaller:
        alternatives[f"image_size: {smaller}"] = lambda: _training(plan, image_size=smaller)
    return alternatives


def _training(plan: StagePlan, **changes: object) -> StagePlan:
    return replace(plan, train=plan.train.model_copy(update=changes))
