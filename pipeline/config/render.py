"""A job in words: everything it resolves to and where from (`--dry-run`), and what a key means (`explain`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config.job_queries import (
    batches,
    dataset_name,
    evaluate_image_size,
    prepared_names,
    stage_names,
    steps,
    train_config,
)
from pipeline.config.load import DEFAULT, LoadedJob
from pipeline.config.machine import device
from pipeline.config.machine import world_size as processes
from pipeline.config.schema import Job
from pipeline.config.schema_text import describe
from pipeline.config.yaml_tree.reading import scalar
from pipeline.errors import ConfigError
from pipeline.suggest import closest

MARGIN = 58  # column of the origins


def job_file(loaded: LoadedJob) -> str:
    """The resolved job as a job file of its own, with the origin of each value as a comment: what run.yaml holds."""
    return "\n".join(_yaml(loaded.resolved(), loaded.origins)) + "\n"


def dry_run(
    loaded: LoadedJob, *, world_size: int | None = None, images: Mapping[str, int] | None = None
) -> str:
    """The resolved job with the origin of each value, and what would run, as plain text.

    ``images``: training images of datasets that are prepared already; generated ones are known without.
    """
    world = processes(loaded.job.cluster) if world_size is None else world_size
    lines = ["", "# What would run", *_plan(loaded.job, world, images or {})]
    if loaded.notes:
        lines += ["", "# Notes", *loaded.notes]
    return job_file(loaded) + "\n".join(lines) + "\n"


def _yaml(
    values: Mapping[str, Any], origins: Mapping[str, str], above: str = "", indent: str = ""
) -> Iterator[str]:
    for key, value in values.items():
        dotted = f"{above}{key}"
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:"
            yield from _yaml(value, origins, f"{dotted}.", indent + "  ")
        else:
            yield f"{f'{indent}{key}: {_text(value)}':<{MARGIN}}  # {origins.get(dotted, DEFAULT)}"


def _text(value: Any) -> str:
    """A value as YAML that reads back as the same."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if not isinstance(value, str):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_./-]*", value) and scalar(value) == value:
        return value
    letters = (
        json.dumps(one, ensure_ascii=False)[1:-1] if one.isprintable() else f"\\U{ord(one):08x}"
        for one in value
    )
    return f'"{"".join(letters)}"'


def _plan(job: Job, world: int, images: Mapping[str, int]) -> Iterator[str]:
    for stage in stage_names(job):
        yield f"{stage:<9} {_stage(job, stage, world, images)}"


def _stage(job: Job, stage: str, world: int, images: Mapping[str, int]) -> str:
    where = f"{world} process{'es' if world > 1 else ''} on {device(job.cluster)}"
    if stage == "prepare":
        return "; ".join(
            f"{name} ({job.data[name].root or 'made up'})"
            for name in prepared_names(job)
            if name in job.data
        )
    if stage == "evaluate":
        return f"{dataset_name(job, stage)}, {evaluate_image_size(job)} pixels, {where}"
    if stage == "export":
        return "safetensors, model.json, preprocessing and class names"
    train, name = train_config(job, stage), dataset_name(job, stage)
    weights = f"from {train.initial}" if train.initial else "from scratch"
    micro, accumulation = batches(train, world)
    made_up = job.data[name].synthetic
    known = images.get(name) or (
        made_up.classes * made_up.images_per_class if made_up is not None else None
    )
    length = f"{train.epochs} epochs" + (f", about {steps(train, known)} steps" if known else "")
    if train.max_steps is not None and not known:
        length += f", at most {train.max_steps} steps"
    return (
        f"{name}, {weights}, {train.image_size} pixels, {length}; {where}, {train.precision}, ZeRO-{train.zero_stage}, "
        f"global batch {train.global_batch} = {world} x {micro} x {accumulation} (processes x micro batch x accumulation)"
    )


def explain(key: str, loaded: LoadedJob | None = None) -> str:
    """What a key means, its type, unit and default and, with a job, its values and where they come from.

    A last part alone will do (``lr``). Raises ConfigError with the closest key where there is none.
    """
    found = _find(key)
    first = found[0]
    lines = [first.dotted, f"  {first.description}"]
    if first.keys:
        children = [child for name in first.keys if (child := first.child(name)) is not None]
        lines += [f"    {child.path[-1]:<20} {child.description}" for child in children]
        return "\n".join(lines)
    lines.append(f"  type     {first.expectation}")
    if first.unit:
        lines.append(f"  unit     {first.unit}")
    lines.append(
        f"  default  {'none: it must be given' if first.required else json.dumps(first.schema.get('default'))}"
    )
    if len(found) > 1:
        lines.append(f"  also     {', '.join(one.dotted for one in found[1:])}")
    if loaded is not None:
        lines += _present(found, loaded)
    return "\n".join(lines)


def _find(key: str) -> list[describe.Field]:
    """The key that was asked for, then those of the same name in other stages. Raises ConfigError where there is none."""
    path = tuple(part for part in key.strip().split(".") if part)
    if len(path) > 1 and path[0] == "data" and describe.is_dataset_key(path[1]):
        path = ("data", describe.ANY, *path[1:])
    everything = list(describe.all_fields())
    if path and (asked := describe.field(path)) is not None:
        stage, rest = path[0] == "stages", path[2:]
        return [
            asked,
            *(
                one
                for one in everything
                if stage and rest and one.path[2:] == rest and one.path[1] != path[1]
            ),
        ]
    if path and (ending := [one for one in everything if one.path[-len(path) :] == path]):
        return ending
    last = closest(key.rpartition(".")[2], [one.path[-1] for one in everything])
    best = closest(key, [one.dotted for one in everything]) or last
    remedy = f"did you mean '{best}'?" if best else f"sections: {', '.join(describe.root().keys)}"
    raise ConfigError(f"there is no key '{key}'", place="explain", remedy=remedy)


def _present(found: list[describe.Field], loaded: LoadedJob) -> Iterator[str]:
    """The values that a job has under these keys."""
    wanted = [re.escape(one.dotted).replace(re.escape(describe.ANY), "[^.]+") for one in found]
    keys = [key for key in loaded.origins if any(re.fullmatch(pattern, key) for pattern in wanted)]
    for key in keys:
        value: Any = loaded.resolved()
        for part in key.split("."):
            value = value[part]
        yield f"  {key} = {json.dumps(value, ensure_ascii=False)}  ({loaded.origins[key]})"
    if not keys:
        yield f"  not in the job {loaded.job.name}"
