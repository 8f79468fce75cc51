"""Chooses ``micro_batch: auto`` on GPUs: as many images as the estimated memory allows.

On a CPU, 'auto' stays: all images of a process in one pass.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.config.job_queries import TRAINING, batches, stage_names
from pipeline.config.load import LoadedJob
from pipeline.config.memory import GIB, usable
from pipeline.config.memory_plan import MicroBatch, StagePlan, stage_plan
from pipeline.errors import ConfigError


def choose_micro_batches(
    loaded: LoadedJob, world_size: int, device_bytes: float | None
) -> LoadedJob:
    """Replace ``micro_batch: auto`` of every training stage; add a note on each stage's memory.

    A stage that cannot work stays as it is: the check reports it.

    Args:
        device_bytes: memory of the smallest GPU; None on a CPU, where nothing changes.
    """
    if device_bytes is None:
        return loaded
    for stage in stage_names(loaded.job):
        if stage in TRAINING:
            loaded = _with_choice(loaded, stage, world_size, device_bytes)
    return loaded


def _with_choice(loaded: LoadedJob, stage: str, world_size: int, device_bytes: float) -> LoadedJob:
    try:
        plan = stage_plan(loaded.job, stage, world_size, device_bytes)
        batches(plan.train, world_size)
    except ConfigError:
        return loaded
    wanted = plan.train.micro_batch
    chosen = plan.best() if wanted == "auto" else plan.of_size(wanted)
    if chosen is None:
        return loaded
    key = f"stages.{stage}.micro_batch"
    reason = _reason(chosen, plan)
    notes = [*loaded.notes, f"{key} = {chosen.images}: {reason}"]
    if wanted != "auto":
        return replace(loaded, notes=notes)
    train = plan.train.model_copy(update={"micro_batch": chosen.images})
    stages = loaded.job.stages.model_copy(update={stage: train})
    return replace(
        loaded,
        job=loaded.job.model_copy(update={"stages": stages}),
        origins=loaded.origins | {key: f"chosen: {reason}"},
        notes=notes,
    )


def _reason(chosen: MicroBatch, plan: StagePlan) -> str:
    """Example: "69.8 of 71.3 GiB per GPU (estimate), all 8 columns stored"."""
    needed = chosen.memory.needed(chosen.images) / GIB
    text = f"{needed:.1f} of {usable(plan.device_bytes) / GIB:.1f} GiB per GPU (estimate)"
    if plan.model.activations != "exact":
        return text
    columns = plan.model.columns
    count = {0: f"none of {columns}", columns: f"all {columns}"}
    stored = count.get(chosen.stored, f"{chosen.stored} of {columns}")
    return f"{text}, {stored} columns stored"
