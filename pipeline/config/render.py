"""A job in words: everything it resolves to and where from (`--dry-run`), and what a key means (`explain`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config import describe
from pipeline.config.derive import TRAINING, batches, dataset_name, evaluate_image_size, prepared_names, stage_names, steps, train_config
from pipeline.config.editor import json_schema
from pipeline.config.load import DEFAULT, LoadedJob
from pipeline.config.machine import device
from pipeline.config.machine import world_size as processes
from pipeline.config.problems import closest
from pipeline.config.schema import Job
from pipeline.errors import ConfigError

__all__ = ["dry_run", "explain", "json_schema"]

MARGIN = 58  # column of the origins


def dry_run(loaded: LoadedJob, *, world_size: int | None = None, images: Mapping[str, int] | None = None) -> str:
    """The resolved job as YAML with the origin of each value as a comment, and what would run, as plain text without markup.

    ``images``: training images of datasets that are prepared already; generated ones are known without.
    """
    world = processes(loaded.job.cluster) if world_size is None else world_size
    lines = [*_yaml(loaded.resolved(), loaded.origins), "", "# What would run", *_plan(loaded.job, world, images or {})]
    if loaded.notes:
        lines += ["", "# Said aloud", *loaded.notes]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value.replace("_", "a").isalnum() and not value[0].isdigit() else json.dumps(value)


def _yaml(values: Mapping[str, Any], origins: Mapping[str, str], above: str = "", indent: str = "") -> Iterator[str]:
    for key, value in values.items():
        dotted = f"{above}{key}"
        if value is None and "stages." in dotted and dotted.count(".") == 1:
            continue  # a stage that the job does not have
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:"
            yield from _yaml(value, origins, f"{dotted}.", indent + "  ")
        else:
            yield f"{f'{indent}{key}: {_text(value)}':<{MARGIN}}  # {origins.get(dotted, DEFAULT)}"


def _plan(job: Job, world: int, images: Mapping[str, int]) -> Iterator[str]:
    for stage in stage_names(job):
        yield f"{stage:<9} {_stage(job, stage, world, images)}"


def _stage(job: Job, stage: str, world: int, images: Mapping[str, int]) -> str:
    where = f"{world} process{'es' if world > 1 else ''} on {device(job.cluster)}"
    if stage == "prepare":
        return "; ".join(f"{name} ({job.data[name].root or 'made up'})" for name in prepared_names(job) if name in job.data)
    if stage == "evaluate":
        return f"{dataset_name(job, stage)}, {evaluate_image_size(job)} pixels, {where}"
    if stage == "export":
        return "safetensors, model.json, preprocessing and class names"
    train, name = train_config(job, stage), dataset_name(job, stage)
    micro, accumulation = batches(train, world)
    made_up = job.data[name].generate
    known = images.get(name) or (made_up.classes * made_up.images_per_class if made_up is not None else None)
    length = f"{train.epochs} epochs" + (f", about {steps(train, known)} steps" if known else "")
    if train.max_steps is not None and not known:
        length += f", at most {train.max_steps} steps"
    return (
        f"{name}, {train.image_size} pixels, {length}; {where}: global batch {train.global_batch} = {world} x {micro} x "
        f"{accumulation} (processes x micro batch x accumulation), {train.precision}, ZeRO-{train.zero_stage}"
    )


def explain(key: str, loaded: LoadedJob | None = None) -> str:
    """What a key means, its type, unit and default and, with a job, its value and where that comes from.

    A last part alone will do (``lr``). Raises ConfigError with the closest key where there is none.
    """
    found = _find(key)
    if loaded is not None and found.path[0] == "data" and len(found.path) > 1 and found.path[1] == describe.ANY:
        names = list(loaded.job.data)
        return "\n".join(_entry(_named(found, name), loaded) for name in names)
    return _entry(found, loaded)


def _named(found: describe.Field, name: str) -> describe.Field:
    return describe.Field(("data", name, *found.path[2:]), found.schema, found.required)


def _find(key: str) -> describe.Field:
    path = tuple(part for part in key.strip().split(".") if part)
    if len(path) > 1 and path[0] == "data" and describe.single_dataset(path[1:2]):
        path = ("data", describe.ANY, *path[1:])
    found = describe.field(path) if path else None
    if found is not None:
        return found
    everything = list(describe.all_fields())
    ending = [one for one in everything if one.path[-len(path) :] == path] if path else []
    if ending:
        return ending[0]
    best = closest(key, [one.dotted for one in everything]) or closest(path[-1] if path else "", [one.path[-1] for one in everything])
    remedy = f"did you mean '{best}'?" if best else f"sections: {', '.join(describe.root().keys)}"
    raise ConfigError(f"there is no key '{key}'", place="explain", remedy=remedy)


def _entry(found: describe.Field, loaded: LoadedJob | None) -> str:
    lines = [found.dotted, f"  {found.description}"]
    if found.keys:
        lines += [f"    {key:<18} {child.description}" for key in found.keys if (child := found.child(key)) is not None]
        return "\n".join(lines)
    lines.append(f"  type     {found.expectation}")
    if found.unit:
        lines.append(f"  unit     {found.unit}")
    default = "none: it must be given" if found.required else json.dumps(found.schema.get("default"))
    lines.append(f"  default  {default}")
    if len(found.path) > 1 and found.path[1] in TRAINING:
        lines.append(f"  also in  {', '.join(stage for stage in TRAINING if stage != found.path[1])}")
    if loaded is not None:
        lines.append(_present(found, loaded))
    return "\n".join(lines)


def _present(found: describe.Field, loaded: LoadedJob) -> str:
    value: Any = loaded.resolved()
    for key in found.path:
        value = value.get(key) if isinstance(value, dict) else None
    if found.dotted not in loaded.origins:
        return f"  value    not in this job ({loaded.job.name})"
    return f"  value    {json.dumps(value)}  ({loaded.origins[found.dotted]})"
