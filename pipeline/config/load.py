"""A job file, the files that it names and the command line -> a checked Job that knows where each value comes from.

Order: the file; ``--set``; names of files in configs/ replaced by their content; ``${VAR}``; values left to 'auto' that depend on
the images; the schema. Nothing is started here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import advise, classes, references
from pipeline.config.overrides import apply
from pipeline.config.rehearse import ORIGIN as REHEARSE
from pipeline.config.rehearse import rehearse as rehearsed
from pipeline.config.schema import Job
from pipeline.config.source import Node, read_mapping
from pipeline.config.validate import validate
from pipeline.errors import ConfigError

DEFAULT = "default"


@dataclass(frozen=True)
class LoadedJob:
    """A job, where each of its values comes from, and what should be said aloud about it.

    ``origins``: dotted key (of values and of written sections) -> "file:line", "--set", "default", "rehearse" or
    "chosen: <reason>".
    """

    job: Job
    origins: dict[str, str]
    path: Path
    notes: list[str] = field(default_factory=list)

    def resolved(self) -> dict[str, Any]:
        """The whole job as plain values, with the keys of the job file: what run.yaml holds."""
        return resolved(self.job)


def resolved(job: Job) -> dict[str, Any]:
    """The whole job as plain values, with the keys of the job file."""
    return job.model_dump(mode="json", by_alias=True)


def load_job(path: Path, overrides: Sequence[str] = (), *, rehearse: bool = False) -> LoadedJob:
    """Read a job file.

    ``overrides``: "a.b.c=value" texts of ``--set``. ``rehearse``: the same job shrunk to fit a laptop (see rehearse.py).
    Raises ConfigError, with file:line, for everything that the schema or a reference finds wrong (catalogue C1-C4, C6, C9, C10).
    """
    tree = apply(read_mapping(path), overrides)
    tree = references.expand(tree, references.Fragments(path.resolve().parent))
    if rehearse:
        tree = _without_sources(tree)
    tree = references.substitute(tree)
    tree, notes = advise.choose(tree, look=not rehearse)
    tree = _files(tree, path.resolve().parent)
    job = validate(tree)
    notes = _empty_stages(tree) + notes
    origins = _origins(job, tree)
    if rehearse:
        job, changed, said = rehearsed(job)
        origins = {**_origins(job, tree), **{key: REHEARSE for key in changed}}
        notes += said
    return LoadedJob(job, origins, path, notes)


def _origins(job: Job, tree: Node) -> dict[str, str]:
    found: dict[str, str] = {}

    def walk(value: object, path: tuple[str, ...]) -> None:
        node = tree.get(*path)
        if path and (node is not None or not isinstance(value, dict)):
            found[".".join(path)] = node.origin if node is not None else DEFAULT
        if isinstance(value, dict):
            for key, below in value.items():
                walk(below, (*path, key))

    walk(resolved(job), ())
    return found


def _without_sources(tree: Node) -> Node:
    """A rehearsal makes its images up: where the real ones lie does not matter, nor whether its variables are set."""
    data = tree.get("data")
    for name in data.entries() if data is not None else ():
        tree = tree.replaced(("data", name, "root"), Node("", REHEARSE))
    return tree


def _files(tree: Node, job_folder: Path) -> Node:
    """Class lists are found now (C6); sources become absolute, so that every process finds them."""
    data = tree.get("data")
    for name, dataset in data.entries().items() if data is not None else ():
        root, listed = dataset.get("root"), dataset.get("classes")
        if root is not None and isinstance(root.value, str) and root.value:
            tree = tree.replaced(("data", name, "root"), Node(_absolute(root.value, dataset), root.origin))
        if listed is not None and isinstance(listed.value, str) and listed.value != "auto":
            try:
                path = classes.find(listed.value, job_folder)
            except ConfigError as error:
                raise ConfigError(f"data.{name}.classes: {error.cause}", place=listed.origin, remedy=error.remedy) from None
            if path.parent != classes.FOLDER:
                tree = tree.replaced(("data", name, "classes"), Node(os.path.abspath(path), listed.origin))
    return tree


def _absolute(root: str, dataset: Node) -> str:
    layout = dataset.get("layout")
    path = os.path.expanduser(root)
    is_name = layout is not None and layout.value == "huggingface" and not os.path.exists(path)  # a dataset of the hub
    return root if "://" in root or is_name else os.path.abspath(path)


def _empty_stages(tree: Node) -> list[str]:
    stages = tree.get("stages")
    empty = [(name, node) for name, node in stages.entries().items() if node.value is None] if stages is not None else []
    return [f"{node.origin}: stages.{name} is empty and left out; write {name}: {{}} for its defaults" for name, node in empty]
