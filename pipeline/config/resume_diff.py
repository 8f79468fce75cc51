"""Compares the settings a stage was started with to those of the job that would resume it (C8).

Worked example. A pretraining stage was started, was interrupted, and the job file now differs in
four keys:

    stages.pretrain.log_every_steps  10 -> 50      may change: decides what is reported
    model.columns                    8 -> 16       refused: decides what is computed
    stages.finetune.base_lr          1e-3 -> 5e-4  not listed: concerns another stage
    data.other.root                  /a -> /b      not listed: this stage uses another dataset

Whether a key may change is written beside the key in the schema (``Rules.may_change_on_resume``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from pipeline.config.job_queries import ORDER, TRAINING
from pipeline.config.schema import Job
from pipeline.config.schema.rules import may_change_on_resume

# A job as plain values: LoadedJob.resolved(), or stages/<stage>/job.json of a run directory.
Resolved: TypeAlias = Mapping[str, Any]

MISSING = "(not there)"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A key whose value differs. ``allowed``: the started stage may resume with the new value."""

    key: str
    old: object
    new: object
    allowed: bool

    def __str__(self) -> str:
        verdict = "may change" if self.allowed else "refused"
        return f"{self.key}: {json.dumps(self.old)} -> {json.dumps(self.new)}  ({verdict})"


def changes(old: Resolved, new: Resolved, stage: str) -> list[Change]:
    """The keys that ``stage`` depends on and that differ between two resolved jobs.

    Keys of other stages, and of datasets that the stage does not use, are not listed.
    """
    # Compare flat keys rather than sections, so that one changed value is one line for the user.
    before = dict(_flatten(_settings_of(old, stage)))
    after = dict(_flatten(_settings_of(new, stage)))
    keys = dict.fromkeys([*before, *after])  # those of the old job first
    return [
        Change(
            key=key,
            old=before.get(key, MISSING),
            new=after.get(key, MISSING),
            allowed=may_change_on_resume(Job, key.split("."), stage),
        )
        for key in keys
        if before.get(key, MISSING) != after.get(key, MISSING)
    ]


def _settings_of(job: Resolved, stage: str) -> Resolved:
    """The part of a job that a stage depends on."""
    data = job.get("data", {})
    settings = {
        "seed": job.get("seed"),
        "cluster": job.get("cluster", {}),
        "stages": {stage: _section(job, stage)},
        "data": {name: data[name] for name in _datasets(job, stage) if name in data},
    }
    # Preparation does not depend on the network: another model keeps the prepared shards.
    if stage != "prepare":
        settings["model"] = job.get("model", {})
    return settings


def _section(job: Resolved, stage: str) -> Resolved:
    section: Resolved = job.get("stages", {}).get(stage) or {}
    return section


def _datasets(job: Resolved, stage: str) -> list[str]:
    """Names of the datasets that a stage uses.

    The same rules as ``job_queries.dataset_name``, for plain values: an old run may hold a job that
    today's schema refuses.
    """
    names = list(job.get("data", {}))
    section = _section(job, stage)
    chosen = section.get("data")
    if stage == "prepare":
        return chosen or names
    if chosen:
        return [chosen]
    source = section.get("from", "")
    if stage not in TRAINING and source in ORDER and _section(job, source):
        return _datasets(job, source)  # evaluation uses the dataset of the stage it evaluates
    # Several datasets and none chosen: the job is invalid and `check` reports it.
    return names if len(names) == 1 else []


def _flatten(section: Resolved, above: str = "") -> Iterator[tuple[str, object]]:
    """{"model": {"columns": 4}} -> ("model.columns", 4)."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
