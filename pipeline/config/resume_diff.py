"""What changed between a run that has begun and the job that would go on with it, and whether it may (C8)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.job_queries import ORDER, TRAINING

Resolved = Mapping[str, Any]

MISSING = "(not there)"
# Keys, without the section in front, that change how a stage runs or reports, but not what it computes.
TRAIN_ALLOWED = {
    "log_every_steps",
    "eval_every_epochs",
    "eval_resize",
    "keep_checkpoints",
    "checkpoint_every_steps",
    "micro_batch",
    "zero_stage",
    "recipe",
    "on_mismatch",
    "on_bad_sample",
}
EVALUATE_ALLOWED = {"batch"}
MODEL_ALLOWED = {"activations", "stored_columns"}
DATA_ALLOWED_LATER = {"root"}  # once prepared, the shards are what is read


@dataclass(frozen=True)
class Change:
    """One key that differs; ``allowed``: the begun stage may go on with the new value."""

    key: str
    old: Any
    new: Any
    allowed: bool

    def __str__(self) -> str:
        sign = "may change" if self.allowed else "refused"
        return f"{self.key}: {json.dumps(self.old)} -> {json.dumps(self.new)}  ({sign})"


def changes(old: Resolved, new: Resolved, stage: str) -> list[Change]:
    """The keys that concern ``stage`` and differ between two resolved jobs (LoadedJob.resolved(), run.yaml).

    Keys of other stages and of datasets that the stage does not use are left out: changing them does not concern it.
    """
    before, after = dict(_flat(_concerning(old, stage))), dict(_flat(_concerning(new, stage)))
    keys = [*before, *(key for key in after if key not in before)]
    return [
        Change(key, before.get(key, MISSING), after.get(key, MISSING), _allowed(key, stage))
        for key in keys
        if before.get(key, MISSING) != after.get(key, MISSING)
    ]


def _concerning(job: Resolved, stage: str) -> dict[str, Any]:
    """The part of a job that a stage depends on."""
    sections = job.get("stages", {})
    section = sections.get(stage) or {}
    part: dict[str, Any] = {
        "seed": job.get("seed"),
        "cluster": job.get("cluster", {}),
        "stages": {stage: section},
    }
    data = job.get("data", {})
    part["data"] = {name: data[name] for name in _datasets(job, stage) if name in data}
    if stage != "prepare":
        part["model"] = job.get("model", {})
    return part


def _datasets(job: Resolved, stage: str) -> list[str]:
    sections, data = job.get("stages", {}), list(job.get("data", {}))
    section = sections.get(stage) or {}
    if stage == "prepare":
        return section.get("data") or data
    if section.get("data"):
        return [section["data"]]
    source = section.get("from", "")
    if stage not in TRAINING and source in ORDER and sections.get(source):
        return _datasets(job, source)
    return data if len(data) == 1 else []


def _flat(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, below in value.items():
        if isinstance(below, Mapping) and below:
            yield from _flat(below, f"{above}{key}.")
        else:
            yield f"{above}{key}", below


def _allowed(key: str, stage: str) -> bool:
    section, _, rest = key.partition(".")
    last = key.rpartition(".")[2]
    if section == "cluster":
        return True
    if section == "model":
        return rest in MODEL_ALLOWED
    if section == "data":
        return stage != "prepare" and last in DATA_ALLOWED_LATER
    if section == "stages" and stage in TRAINING:
        return key.count(".") == 2 and last in TRAIN_ALLOWED
    return section == "stages" and stage == "evaluate" and last in EVALUATE_ALLOWED
