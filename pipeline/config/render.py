"""Renders a job as text: its values with their origins (``--dry-run``), or a key (``explain``)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from pipeline.command import command
from pipeline.config.job_queries import (
    batches,
    dataset_name,
    evaluate_image_size,
    prepared_names,
    stage_names,
    steps,
    train_config,
)
from pipeline.config.load import DEFAULT, LoadedJob, plain_values
from pipeline.config.machine import device
from pipeline.config.machine import world_size as processes
from pipeline.config.schema import Job
from pipeline.config.schema.renamed import RENAMED_KEYS
from pipeline.config.schema_text import describe, suggestions
from pipeline.config.schema_text.describe import SchemaKey
from pipeline.config.yaml_tree.reading import scalar
from pipeline.errors import ConfigError
from pipeline.suggest import closest

MARGIN = 58  # column of the origins


def job_file(loaded: LoadedJob) -> str:
    """The resolved job as a job file, each value with its origin as a comment: run.yaml."""
    return "\n".join(_yaml(loaded.resolved(), loaded.origins)) + "\n"


def portable_job_file(loaded: LoadedJob) -> str:
    """The job as a file that needs no other file of this machine, for a cluster.

    Values left to 'auto' are still 'auto': the cluster's machines see the images.
    """
    values = loaded.written.data()
    for section in values.get("stages", {}).values():
        # The recipe's keys stand in the stage. The file itself stays here if it is the user's own.
        if isinstance(section, dict) and "/" in str(section.get("recipe", "")):
            del section["recipe"]
    return "\n".join(_yaml(values)) + "\n"


def plain_job_file(job: Job) -> str:
    """The resolved job as a job file, without the origins of its values."""
    return "\n".join(_yaml(plain_values(job))) + "\n"


def dry_run(
    loaded: LoadedJob, *, world_size: int | None = None, images: Mapping[str, int] | None = None
) -> str:
    """The resolved job with the origin of each value, and the plan of its stages.

    Args:
        world_size: number of training processes; default: as the job says.
        images: number of training images of datasets that are already prepared. The number of
            synthetic images is known without it.
    """
    world = processes(loaded.job.cluster) if world_size is None else world_size
    lines = ["", "# Plan", *_plan(loaded.job, world, images or {})]
    if loaded.notes:
        lines += ["", "# Notes", *loaded.notes]
    return job_file(loaded) + "\n".join(lines) + "\n"


def _yaml(
    values: Mapping[str, object],
    origins: Mapping[str, str] | None = None,
    above: str = "",
    indent: str = "",
) -> Iterator[str]:
    for key, value in values.items():
        dotted = f"{above}{key}"
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:"
            yield from _yaml(value, origins, f"{dotted}.", indent + "  ")
        else:
            line = f"{indent}{key}: {_text(value)}"
            yield line if origins is None else f"{line:<{MARGIN}}  # {origins.get(dotted, DEFAULT)}"


def _text(value: object) -> str:
    """A value as YAML that reads back as the same value."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if not isinstance(value, str):
        return json.dumps(value)
    # Without quotes only if YAML reads it back as the same text: "2024" would become a number.
    if re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_./-]*", value) and scalar(value) == value:
        return value
    # YAML's escapes are JSON's, but JSON writes characters beyond U+FFFF as two surrogates, which
    # YAML refuses. Printable characters are written as they are, all others as \UXXXXXXXX.
    letters = (
        json.dumps(letter, ensure_ascii=False)[1:-1]
        if letter.isprintable()
        else f"\\U{ord(letter):08x}"
        for letter in value
    )
    return f'"{"".join(letters)}"'


def _plan(job: Job, world: int, images: Mapping[str, int]) -> Iterator[str]:
    for stage in stage_names(job):
        yield f"{stage:<9} {_stage(job, stage, world, images)}"


def _stage(job: Job, stage: str, world: int, images: Mapping[str, int]) -> str:
    where = f"{world} process{'es' if world > 1 else ''} on {device(job.cluster)}"
    if stage == "prepare":
        names = [name for name in prepared_names(job) if name in job.data]
        return "; ".join(f"{name} ({job.data[name].root or 'synthetic'})" for name in names)
    if stage == "evaluate":
        return f"{dataset_name(job, stage)}, {evaluate_image_size(job)} pixels, {where}"
    if stage == "export":
        return "safetensors, model.json, preprocessing and class names"
    train = train_config(job, stage)
    micro, accumulation = batches(train, world)
    parts = [
        dataset_name(job, stage),
        f"from {train.initial}" if train.initial else "from scratch",
        f"{train.image_size} pixels",
        _length(job, stage, images),
    ]
    return (
        f"{', '.join(parts)}; {where}, {train.precision}, ZeRO-{train.zero_stage}, "
        f"global batch {train.global_batch} = {world} x {micro} x {accumulation} "
        "(processes x micro batch x accumulation)"
    )


def _length(job: Job, stage: str, images: Mapping[str, int]) -> str:
    """The length of a training stage: epochs, and steps if the number of images is known."""
    train = train_config(job, stage)
    name = dataset_name(job, stage)
    epochs = f"{train.epochs} epoch{'s' if train.epochs > 1 else ''}"
    synthetic = job.data[name].synthetic
    # The number of real images is known only after preparation; of synthetic ones, at once.
    count = images.get(name)
    if not count and synthetic is not None:
        count = synthetic.classes * synthetic.images_per_class
    if count:
        return f"{epochs}, about {steps(train, count)} steps"
    limit = f", at most {train.max_steps} steps" if train.max_steps is not None else ""
    return f"{epochs}{limit}"


def explain(key: str, loaded: LoadedJob | None = None) -> str:
    """Meaning, type, unit and default of a key; with a job, its values and their origins.

    The last part of a key is enough (``base_lr``).

    Raises:
        ConfigError: there is no such key, or it was renamed; names the closest one or the new one.
    """
    keys = _find(key)
    first = keys[0]
    # A section: list its keys. A value: type, unit, default and where else the name occurs.
    lines = [first.dotted, f"  {first.description}"]
    if first.keys:
        children = [child for name in first.keys if (child := first.child(name)) is not None]
        lines += [f"    {child.path[-1]:<24} {child.description}" for child in children]
        return "\n".join(lines)
    lines.append(f"  type     {first.expectation}")
    if first.how_chosen:
        lines.append(f"  auto     {first.how_chosen}")
    if first.unit:
        lines.append(f"  unit     {first.unit}")
    default = "none: required" if first.required else json.dumps(first.schema.get("default"))
    lines.append(f"  default  {default}")
    if len(keys) > 1:
        lines.append(f"  also     {', '.join(other.dotted for other in keys[1:])}")
    if loaded is not None:
        lines += _present(keys, loaded)
    return "\n".join(lines)


def _find(key: str) -> list[SchemaKey]:
    """The requested key, then those with the same name in other sections.

    Raises:
        ConfigError: see ``explain``.
    """
    path = tuple(part for part in key.strip().split(".") if part)
    if len(path) > 1 and path[0] == "data" and suggestions.means_dataset_key(path[1]):
        path = ("data", describe.ANY, *path[1:])  # data.root: of any dataset
    keys = _matching(path)
    if keys:
        return keys
    present = tuple(RENAMED_KEYS.get(part, part) for part in path)
    if present != path and _matching(present):
        old_and_new = zip(path, present, strict=True)
        cause = ", ".join(
            f"'{old}' was renamed to '{new}'" for old, new in old_and_new if old != new
        )
        new_key = ".".join(part for part in present if part != describe.ANY)
        raise ConfigError(cause, place="explain", remedy=command("explain", new_key))
    # Compare whole keys first; `pretrain.epoch` resembles no whole key, but its last part does.
    everything = list(describe.all_keys())
    last = closest(key.rpartition(".")[2], [known.path[-1] for known in everything])
    best = closest(key, [known.dotted for known in everything]) or last
    meant = suggestions.keys_meant(key.rpartition(".")[2]) or ([best] if best else [])
    remedy = suggestions.ask(meant) if meant else f"sections: {', '.join(describe.root().keys)}"
    raise ConfigError(f"there is no key '{key}'", place="explain", remedy=remedy)


def _matching(path: tuple[str, ...]) -> list[SchemaKey]:
    """The key at a full path and its namesakes in other stages, or all keys that end with it."""
    if not path:
        return []
    everything = list(describe.all_keys())
    # A full key: show its namesake in the other training stage too, which is often the one meant.
    exact = describe.find(path)
    if exact is None:
        return [key for key in everything if key.path[-len(path) :] == path]
    if path[0] != "stages" or len(path) < 3:
        return [exact]
    return [
        exact,
        *(key for key in everything if key.path[2:] == path[2:] and key.path[1] != path[1]),
    ]


def _present(keys: list[SchemaKey], loaded: LoadedJob) -> Iterator[str]:
    """The values that a job has for these keys."""
    # data.<name>.root stands for the root of every dataset of the job.
    patterns = [re.escape(key.dotted).replace(re.escape(describe.ANY), "[^.]+") for key in keys]
    dotted_keys = [
        dotted
        for dotted in loaded.origins
        if any(re.fullmatch(pattern, dotted) for pattern in patterns)
    ]
    for dotted in dotted_keys:
        value: object = loaded.resolved()
        for part in dotted.split("."):
            assert isinstance(value, dict)
            value = value[part]
        yield f"  {dotted} = {json.dumps(value, ensure_ascii=False)}  ({loaded.origins[dotted]})"
    if not dotted_keys:
        yield f"  not in the job {loaded.job.name}"
