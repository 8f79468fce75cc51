"""Memory, time and bytes of a training stage before it runs, from the estimates of ``config``.

The same estimate bounds ``micro_batch: auto``, so a plan shows what a run will choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.config.checks.checker import Checker
from pipeline.config.checks.training import check_training
from pipeline.config.devices import DeviceFacts
from pipeline.config.job_queries import steps
from pipeline.config.memory import StageMemory, checkpoint_bytes, network_sizes, usable
from pipeline.config.memory_plan import StagePlan
from pipeline.config.network_sizes import NetworkSizes
from pipeline.config.schema import Job, TrainConfig
from pipeline.config.speed import ImageWork, StepEstimate, image_work, step_time

HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A stage with one choice of the settings that decide memory and time, not the result.

    Attributes:
        stored: columns that store their activations.
        images: of the training split; None if it is not known.
    """

    train: TrainConfig
    device: DeviceFacts
    world_size: int
    micro_batch: int
    stored: int
    compiled: bool
    sizes: NetworkSizes
    memory: StageMemory
    work: ImageWork
    time: StepEstimate
    device_bytes: float
    images: int | None

    @property
    def needed(self) -> float:
        """Peak bytes per device."""
        return self.memory.needed(self.micro_batch)

    @property
    def fits(self) -> bool:
        """Whether that is less than what tensors can fill."""
        return self.memory.fits(self.micro_batch, self.device_bytes)

    @property
    def usable(self) -> float:
        """Bytes per device that tensors can fill."""
        return usable(self.device_bytes)

    @property
    def accumulation(self) -> int:
        """Micro-batches per step."""
        return self.train.global_batch // (self.world_size * self.micro_batch)

    @property
    def images_per_s(self) -> float:
        """Of all devices."""
        return self.train.global_batch / self.time.seconds

    @property
    def mfu(self) -> float:
        """Share of the devices' peak that the arithmetic of the network takes."""
        return self._share(self.work.model_flops)

    @property
    def hfu(self) -> float:
        """The same with what is computed again."""
        return self._share(self.work.executed_flops)

    def _share(self, flops: float) -> float:
        peak = self.device.peak[self.train.precision] * self.world_size
        return self.images_per_s * flops / peak

    @property
    def steps(self) -> int | None:
        """Of the whole stage."""
        return None if self.images is None else steps(self.train, self.images)

    @property
    def hours(self) -> float | None:
        """Of the steps of the whole stage; evaluations and checkpoints come on top."""
        return None if self.steps is None else self.steps * self.time.seconds / HOUR

    @property
    def checkpoint_bytes(self) -> float:
        """Of one checkpoint."""
        return checkpoint_bytes(self.sizes, self.train)


def forecast(
    plan: StagePlan,
    device: DeviceFacts,
    *,
    micro_batch: int,
    stored: int,
    images: int | None,
) -> Forecast:
    """The forecast of a stage as its plan describes it."""
    sizes = network_sizes(plan.model, plan.train, plan.classes)
    work = image_work(sizes, plan.train.precision, stored)
    return Forecast(
        train=plan.train,
        device=device,
        world_size=plan.world_size,
        micro_batch=micro_batch,
        stored=stored,
        compiled=plan.model.compile,
        sizes=sizes,
        memory=plan.memory(stored),
        work=work,
        time=step_time(
            work,
            sizes,
            plan.train,
            device=device,
            world_size=plan.world_size,
            micro_batch=micro_batch,
        ),
        device_bytes=plan.device_bytes,
        images=images,
    )


def as_written(plan: StagePlan, device: DeviceFacts, images: int | None) -> Forecast:
    """The stage with the settings of the job.

    Values left to 'auto' are chosen; if nothing fits, the smallest micro-batch stands for them.
    """
    # A job that fits nowhere still has a forecast: its memory shows by how much it is too large.
    wanted = plan.train.micro_batch
    chosen = plan.best() if wanted == "auto" else plan.of_size(wanted)
    smallest = next(iter(plan.sizes()), 1)
    return forecast(
        plan,
        device,
        micro_batch=chosen.images if chosen else smallest if wanted == "auto" else wanted,
        stored=chosen.stored if chosen else plan.least_stored,
        images=images,
    )


def alternatives(
    job: Job, stage: str, plan: StagePlan, device: DeviceFacts, images: int | None
) -> list[Forecast]:
    """The stage with every allowed ZeRO stage, with and without stored columns, fastest first.

    Each with the micro-batch that is best for it; those that do not fit come last.
    """
    forecasts = []
    for variant in _variants(plan):
        chosen = variant.best()
        # A variant that does not fit is shown too, so that its memory can be seen.
        entry = as_written(variant, device, images)
        if chosen is None or _is_allowed(job, stage, variant, chosen.images):
            forecasts.append(entry)
    return sorted(forecasts, key=lambda entry: (not entry.fits, entry.time.seconds))


def _variants(plan: StagePlan) -> Iterator[StagePlan]:
    exact = plan.model.activations == "exact"
    for zero_stage in range(4):
        # ZeRO 3 gathers the weights of a level in hooks, which compiled levels do not run.
        compiles = plan.model.compile and zero_stage < 3
        # "auto" stores as many columns as fit; 0 is the least memory.
        for stored in ("auto", 0) if exact else (plan.model.stored_columns,):
            changes = {"stored_columns": stored, "compile": compiles}
            yield replace(
                plan,
                model=plan.model.model_copy(update=changes),
                train=plan.train.model_copy(
                    update={"zero_stage": zero_stage, "micro_batch": "auto"}
                ),
            )


def _is_allowed(job: Job, stage: str, variant: StagePlan, micro_batch: int) -> bool:
    """Whether the checks of a job accept a variant of a stage."""
    train = variant.train.model_copy(update={"micro_batch": micro_batch})
    # The same checks as for a job file, so that no plan recommends what a job refuses.
    changed = job.model_copy(
        update={"model": variant.model, "stages": job.stages.model_copy(update={stage: train})}
    )
    checker = Checker(changed, {}, None)
    check_training(checker, stage, train, variant.world_size)
    return not checker.problems
