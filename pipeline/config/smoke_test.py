"""``--rehearse``: the same job, shrunk to minutes on two CPU processes.

How each key shrinks is written beside the key in the schema (``Rules.rehearse``); the functions are
in ``schema.shrink``. This module applies them in three steps:

1. Replace the inputs: synthetic images instead of the real sources, no weights files. A rehearsal
   has neither.
2. Check the job at its real sizes. Small, it might work although the real one cannot: 63 images do
   not divide among 8 processes, the rehearsal's 16 images do.
3. Shrink the rest: widths, image sizes, batches, steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.check import check
from pipeline.config.job_queries import train_config, training_stages
from pipeline.config.schema import Job
from pipeline.config.schema.rules import keys_with_rules
from pipeline.config.schema.shrink import RehearsalContext, Shrink, small_image_sizes
from pipeline.sources.class_lists import class_list

ORIGIN = "rehearse"


@dataclass(frozen=True)
class Rehearsal:
    """The shrunk job, the keys that differ from the real one, and notes for the user."""

    job: Job
    changed_keys: list[str]
    notes: list[str]


def rehearse(job: Job, origins: Mapping[str, str]) -> Rehearsal:
    """Shrink a job. ``origins``: file:line of its keys, for messages.

    Raises:
        ConfigError: the real job cannot work, whatever its inputs.
    """
    shrunk = _ShrunkJob(job)
    # 1. Inputs.
    for key, rules in keys_with_rules(job):
        if rules.rehearse_input is not None:
            shrunk.shrink(key, rules.rehearse_input)
    # 2. With 'auto' the real machine is unknown. One process divides every batch, so the check
    # refuses nothing wrongly.
    world_size = 1 if job.cluster.processes == "auto" else job.cluster.processes
    check(shrunk.job(), world_size, origins)
    # 3. Sizes.
    for key, rules in keys_with_rules(job):
        if rules.rehearse is not None:
            shrunk.shrink(key, rules.rehearse)
    # Validate once more: the functions in schema.shrink could produce values the schema refuses.
    return Rehearsal(shrunk.job(), shrunk.changed_keys, shrunk.notes)


class _ShrunkJob:
    """A job as plain values, whose keys are shrunk one by one."""

    def __init__(self, job: Job) -> None:
        self.values: dict[str, Any] = job.model_dump(mode="json", by_alias=True)
        self.changed_keys: list[str] = []
        self.notes: list[str] = []
        self._image_sizes = small_image_sizes(_image_sizes(job))
        self._datasets = list(job.data)
        stages = (train_config(job, name) for name in training_stages(job))
        self._keeps_best = any(stage.keep == "best" for stage in stages)
        self._class_counts = {
            name: None if dataset.classes == "auto" else len(class_list(dataset.classes))
            for name, dataset in job.data.items()
        }

    def job(self) -> Job:
        return Job.model_validate(self.values)

    def shrink(self, key: str, shrink: Shrink) -> None:
        """Replace the value of a dotted key. Values that stay the same are not reported."""
        *above, last = key.split(".")
        section = self.values
        for part in above:
            section = section[part]
        before = section[last]
        after = shrink(before, self._context(above, section))
        if after == before:
            return
        section[last] = after
        self.changed_keys.append(key)
        if isinstance(after, dict):  # the whole section is new
            self.changed_keys += [f"{key}.{part}" for part in after]
            self.notes.append(f"rehearsal: {key} = {_text(after)}")
        else:
            self.notes.append(f"rehearsal: {key} {_text(before)} -> {_text(after)}")

    def _context(self, above: list[str], section: Mapping[str, Any]) -> RehearsalContext:
        """What the key's function may need to know; ``above``: the path of its ``section``."""
        if above[:1] != ["data"]:
            return RehearsalContext(image_sizes=self._image_sizes, section=section)
        name = above[1]
        return RehearsalContext(
            image_sizes=self._image_sizes,
            class_count=self._class_counts[name],
            dataset_number=self._datasets.index(name),
            keeps_best=self._keeps_best,
            section=section,
        )


def _image_sizes(job: Job) -> list[int]:
    stages = (job.stages.pretrain, job.stages.finetune, job.stages.evaluate)
    sizes = [stage.image_size for stage in stages if stage is not None]
    return [size for size in sizes if size is not None]


def _text(value: object) -> str:
    """A value on one line: text as it is, everything else as JSON."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(below)}" for key, below in value.items())
    return value if isinstance(value, str) else json.dumps(value)
