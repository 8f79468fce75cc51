"""Compares the settings a stage was started with to those of the job that would resume it (C8).

Worked example. A pretraining stage was started, was interrupted, and the job file now differs in
four keys:

    stages.pretrain.log_every_steps  10 -> 50      listed: decides what is reported
    model.columns                    8 -> 16       listed, and it changes the result
    stages.finetune.base_lr          1e-3 -> 5e-4  not listed: concerns another stage
    data.toy.root                    /a -> /b      not listed: training depends on the prepared
                                                   dataset, an input with a digest of its own

Which results a key changes is written beside the key in the schema (``Rules.changes``).

The recorded job may come from another version of the schema. A key that it lacks has its default,
as it had when there was no such key; with ``Rules.accepts_missing`` it is not compared. A key that
the schema no longer has is ignored: nothing reads it any more. Renamed keys have their new names
already (``migrate_renamed``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic_core import to_jsonable_python

from pipeline.config.schema import Job, Section
from pipeline.config.schema.rules import (
    accepts_missing,
    changes_result,
    keeps_work,
    key_of,
    named_section,
    section_within,
)

# A job as plain values: LoadedJob.resolved(), or stages/<stage>/job.json of a run directory.
Resolved: TypeAlias = Mapping[str, Any]

MISSING = "(not there)"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A key whose value differs.

    ``changes_result``: the stage's result depends on it. ``keeps_work``: an unfinished stage can
    continue from its work so far nevertheless.
    """

    key: str
    old: object
    new: object
    changes_result: bool
    keeps_work: bool

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.old)} -> {json.dumps(self.new)}"


def changes(old: Resolved, new: Resolved, stage: str) -> list[Change]:
    """The keys of ``stage`` that differ between two resolved jobs.

    Keys of other stages, and of datasets that the stage does not prepare, are not listed.
    """
    # Compare flat keys rather than sections, so that one changed value is one line for the user.
    before = dict(_flatten(_settings_of(_complete(old, Job), stage)))
    after = dict(_flatten(_settings_of(_complete(new, Job), stage)))
    recorded = dict(_flatten(_settings_of(old, stage)))
    keys = dict.fromkeys([*before, *after])  # those of the old job first
    return [
        Change(
            key=key,
            old=before.get(key, MISSING),
            new=after.get(key, MISSING),
            changes_result=changes_result(Job, key.split("."), stage),
            keeps_work=keeps_work(Job, key.split(".")),
        )
        for key in keys
        if before.get(key, MISSING) != after.get(key, MISSING)
        and (key in recorded or not accepts_missing(Job, key.split(".")))
    ]


def _complete(values: Resolved, section: type[Section]) -> dict[str, Any]:
    """The keys of ``section`` in a recorded section: others dropped, missing ones at their default.

    Example: {"columns": 4, "gone": 1} of ModelConfig -> {"columns": 4, "huge": False, ...}.
    """
    complete: dict[str, Any] = {}
    for name, info in section.model_fields.items():
        key = key_of(name, info)
        if key in values:
            value = values[key]
        elif info.is_required():
            continue
        else:
            # As JSON: the record has lists where the schema's default is a tuple.
            value = to_jsonable_python(info.get_default(call_default_factory=True), by_alias=True)
        below = section_within(info.annotation)
        if below is not None and isinstance(value, Mapping):
            named = named_section(info)
            value = (
                {entry: _complete(content, below) for entry, content in value.items()}
                if named
                else _complete(value, below)
            )
        complete[key] = value
    return complete


def _settings_of(job: Resolved, stage: str) -> Resolved:
    """The part of a job that concerns a stage."""
    settings = {
        "seed": job.get("seed"),
        "cluster": job.get("cluster", {}),
        "stages": {stage: _section(job, stage)},
    }
    if stage == "prepare":
        data = job.get("data", {})
        chosen = _section(job, stage).get("data") or list(data)
        return settings | {"data": {name: data[name] for name in chosen if name in data}}
    # Preparation does not depend on the network: another model keeps the prepared shards.
    return settings | {"model": job.get("model", {})}


def _section(job: Resolved, stage: str) -> Resolved:
    section: Resolved = job.get("stages", {}).get(stage) or {}
    return section


def _flatten(section: Resolved, above: str = "") -> Iterator[tuple[str, object]]:
    """{"model": {"columns": 4}} -> ("model.columns", 4)."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
