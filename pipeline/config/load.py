"""A job file, the files that it names and the command line -> a checked Job that knows where each value comes from.

Order: the file; ``--set``; names of files in configs/ replaced by their content; ``${VAR}``; values left to 'auto' that
depend on the images; the schema. Nothing is started here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import auto_values
from pipeline.config.job_queries import ORDER
from pipeline.config.schema import Job
from pipeline.config.schema_text.validate import validate
from pipeline.config.smoke_test import ORIGIN as REHEARSE
from pipeline.config.smoke_test import rehearse as rehearsed
from pipeline.config.yaml_tree import references
from pipeline.config.yaml_tree.overrides import apply
from pipeline.config.yaml_tree.reading import Node, read_mapping
from pipeline.errors import ConfigError
from pipeline.shipped import CONFIGS
from pipeline.sources import class_lists

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
        """The whole job as plain values, with the keys of the job file; a job file of them gives the same job."""
        values = self.job.model_dump(mode="json", by_alias=True)
        values["stages"] = {
            name: section for name, section in values["stages"].items() if section is not None
        }
        return values


def load_job(path: Path, overrides: Sequence[str] = (), *, rehearse: bool = False) -> LoadedJob:
    """Read a job file.

    Args:
        overrides: "a.b.c=value" texts of ``--set``.
        rehearse: the same job shrunk to fit a laptop (see rehearse.py); of the real one is told what cannot work.

    Raises:
        ConfigError: with file:line, all that the schema or a reference finds wrong (catalogue C1-C4, C6, C9, C10).
    """
    folder = path.resolve().parent
    tree = references.expand(apply(read_mapping(path), overrides), references.Fragments(folder))
    if rehearse:
        tree = _without_sources(tree)
    tree = references.substitute(tree)
    tree, notes = auto_values.choose(tree, look=not rehearse)
    tree = _files(tree, folder)
    notes = _empty_stages(tree) + notes
    job = validate(tree)
    origins = _origins(job.model_dump(by_alias=True), tree)
    if not rehearse:
        return LoadedJob(job, origins, path, notes)
    small, changed, said = rehearsed(job, origins)
    origins = _origins(small.model_dump(by_alias=True), tree) | dict.fromkeys(changed, REHEARSE)
    return LoadedJob(small, origins, path, notes + said)


def _origins(values: dict[str, Any], tree: Node, path: tuple[str, ...] = ()) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in values.items():
        node = tree.get(*path, key)
        if node is not None or not isinstance(value, dict):
            found[".".join((*path, key))] = node.origin if node is not None else DEFAULT
        if isinstance(value, dict):
            found |= _origins(value, tree, (*path, key))
    return found


def _without_sources(tree: Node) -> Node:
    """A rehearsal makes its images up: where the real ones lie does not matter, nor whether its variables are set."""
    data = tree.get("data")
    for name in data.entries() if data is not None else ():
        tree = tree.replaced(("data", name, "root"), Node("", REHEARSE))
    return tree


def _files(tree: Node, folder: Path) -> Node:
    """Files that are named are found now (C6) and become absolute, so that every process finds them."""
    data = tree.get("data")
    for name, dataset in data.entries().items() if data is not None else ():
        tree = _replaced(tree, ("data", name, "root"), partial(_source, dataset))
        tree = _replaced(tree, ("data", name, "classes"), partial(_class_list, folder))
    for stage in ORDER:
        tree = _replaced(tree, ("stages", stage, "recipe"), partial(_recipe, folder))
        tree = _replaced(tree, ("stages", stage, "from"), _weights)
    return tree


def _replaced(tree: Node, path: tuple[str, ...], change: Callable[[str], str]) -> Node:
    node = tree.get(*path)
    if node is None or not isinstance(node.value, str) or not node.value:
        return tree
    try:
        return tree.replaced(path, Node(change(node.value), node.origin))
    except ConfigError as error:
        raise ConfigError(
            f"{'.'.join(path)}: {error.cause}", place=node.origin, remedy=error.remedy
        ) from None


def _source(dataset: Node, root: str) -> str:
    layout = dataset.get("layout")
    path = os.path.expanduser(root)
    is_name = (
        layout is not None and layout.value == "huggingface" and not os.path.exists(path)
    )  # a dataset of the hub
    return root if "://" in root or is_name else os.path.abspath(path)


def _class_list(folder: Path, listed: str) -> str:
    if listed == "auto":
        return listed
    path = class_lists.find(listed, folder)
    return listed if path.parent == class_lists.FOLDER else os.path.abspath(path)


def _recipe(folder: Path, name: str) -> str:
    path = references.Fragments(folder).find("recipe", name)
    return name if path is None or path.parent == CONFIGS / "recipe" else os.path.abspath(path)


def _weights(source: str) -> str:
    return (
        os.path.abspath(os.path.expanduser(source)) if source.endswith(".safetensors") else source
    )


def _empty_stages(tree: Node) -> list[str]:
    stages = tree.get("stages")
    empty = (
        [(name, node) for name, node in stages.entries().items() if node.value is None]
        if stages is not None
        else []
    )
    return [
        f"{node.origin}: stages.{name} is empty and left out; write {name}: {{}} for its defaults"
        for name, node in empty
    ]
