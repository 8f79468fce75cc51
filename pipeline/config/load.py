"""Turns a job file, the files it names and the command line into a validated job.

Steps: read the file; apply ``--set``; replace names of files in configs/ by their content; replace
``${VAR}``; choose values left to 'auto' from the images; validate. Every value remembers where it
was written. Nothing is started here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import auto_values, job_name
from pipeline.config.job_queries import ORDER
from pipeline.config.schema import Job
from pipeline.config.schema_text import describe
from pipeline.config.schema_text.validate import validate
from pipeline.config.smoke_test import ORIGIN as REHEARSE
from pipeline.config.smoke_test import rehearse as make_rehearsal
from pipeline.config.starting_point import choose_start
from pipeline.config.trained_weights import describe_network, weights_file
from pipeline.config.yaml_tree import references
from pipeline.config.yaml_tree.diagnostics import raise_problems
from pipeline.config.yaml_tree.old_names import replace_old_names
from pipeline.config.yaml_tree.overrides import apply
from pipeline.config.yaml_tree.reading import Node, read_mapping
from pipeline.errors import ConfigError
from pipeline.files import matches_digest_line
from pipeline.shipped import CONFIGS
from pipeline.sources import class_lists

DEFAULT = "default"
ON = "--on"  # origin of the cluster that the command line names
ON_CLUSTER = "chosen on the cluster"  # origin of a value that only stands for the chosen one
PLANNED = "not needed for a plan"  # origin of a source that is left out
NOTHING_WRITTEN = Node({}, DEFAULT)


@dataclass(frozen=True, kw_only=True)
class LoadedJob:
    """A job, the origin of each of its values, and notes for the user.

    ``origins``: dotted key (of values and of written sections) -> "file:line", "--set", "default",
    "rehearse" or "chosen: <reason>". ``written``: the job without references and variables, before
    the choice of values left to 'auto': what a cluster gets, whose machines choose them.
    """

    job: Job
    origins: dict[str, str]
    path: Path
    notes: list[str] = field(default_factory=list)
    written: Node = NOTHING_WRITTEN

    def resolved(self) -> dict[str, Any]:
        """The job as plain values, with the keys of the job file.

        A job file with these values gives the same job.
        """
        return plain_values(self.job)


def plain_values(job: Job) -> dict[str, Any]:
    """A checked job as plain values, with the keys of the job file; without absent stages."""
    values = job.model_dump(mode="json", by_alias=True)
    values["stages"] = {
        name: section for name, section in values["stages"].items() if section is not None
    }
    return values


def load_job(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    rehearse: bool = False,
    migrate: bool = False,
    on: str = "",
    submits: bool = False,
    plans: bool = False,
) -> LoadedJob:
    """Read a job file.

    Args:
        overrides: "a.b.c=value" texts of ``--set``.
        rehearse: shrink the job to fit a laptop (see ``smoke_test``).
        migrate: accept names of earlier releases. For ``run.yaml`` of a run directory, which this
            pipeline wrote; in a user's file an old name is an error.
        on: name or file of a cluster that replaces the job's; the overrides apply to it.
        plans: the job is only planned: variables that its sources need may be unset.
        submits: a job for a cluster only leaves this machine: its sources may be on the cluster.

    Raises:
        ConfigError: with file:line, every problem of schema and references (C1-C4, C6, C9, C10).
    """
    folder = path.resolve().parent
    fragments = references.Fragments(folder)
    tree = references.name_the_dataset(read_mapping(path))
    _require_unchanged(path)
    # Old names are replaced before files are merged: an old name in run.yaml must override the new
    # one in a recipe.
    tree = replace_old_names(tree, describe.root(), fragments.old_names)
    if on:
        tree = tree.replaced(("cluster",), Node(on, ON))
    tree, left_out = choose_start(apply(tree, overrides))
    tree = references.expand(tree, fragments)
    if not migrate:
        raise_problems(fragments.old_names)
    # Before ${VAR} is replaced: neither a rehearsal nor a plan reads the sources.
    tree = _without_sources(tree, only_unset=plans) if rehearse or plans else tree
    tree = references.substitute(tree)
    written = job_name.with_folder(_with_absolute_paths(tree, folder))
    _refuse_rehearsal_of_weights(written, rehearse)
    # Before the choices: the network's stride decides which image sizes are possible.
    tree, read_notes = describe_network(written)
    missing = _missing_source(written) if submits else ""
    placeholders = REHEARSE if rehearse else ON_CLUSTER if missing else ""
    tree, notes = auto_values.choose(tree, placeholders=placeholders)
    if missing:
        notes.append(f"{missing} is not on this machine: values left to 'auto' are {ON_CLUSTER}")
    tree = job_name.with_folder(_with_absolute_paths(tree, folder))
    notes = _empty_stages(tree) + left_out + read_notes + notes
    job = validate(tree)
    origins = _origins(job.model_dump(by_alias=True), tree)
    if not rehearse:
        return LoadedJob(job=job, origins=origins, path=path, notes=notes, written=written)
    # Only now: the rehearsal checks the real job first, and needs its validated values for that.
    small = make_rehearsal(job, origins)
    origins = _origins(small.job.model_dump(by_alias=True), tree)
    origins |= dict.fromkeys(small.changed_keys, REHEARSE)
    return LoadedJob(job=small.job, origins=origins, path=path, notes=notes + small.notes)


def _require_unchanged(path: Path) -> None:
    """Raise a ConfigError if run.yaml of a run is not as the run wrote it."""
    # A user's own file has no such line.
    if not matches_digest_line(path.read_text(encoding="utf-8")):
        raise ConfigError(
            "checksum mismatch: it changed after a run wrote it",
            place=str(path),
            remedy="rerun the job file that it came from, which writes it again; if you edited it "
            "on purpose, remove its last line",
        )


def _origins(
    values: Mapping[str, object], tree: Node, above: tuple[str, ...] = ()
) -> dict[str, str]:
    """Where each value of a job was written; sections count only if they were written."""
    origins: dict[str, str] = {}
    for key, value in values.items():
        path = (*above, key)
        # A default has no node. A section of defaults gets no entry: nobody wrote it.
        node = tree.get(*path)
        if node is not None or not isinstance(value, dict):
            origins[".".join(path)] = node.origin if node is not None else DEFAULT
        if isinstance(value, dict):
            origins |= _origins(value, tree, path)
    return origins


def _missing_source(tree: Node) -> str:
    """The first source of a job for a cluster that is not on this machine, or ''."""
    kind = tree.get("cluster", "kind")
    data = tree.get("data")
    if kind is None or kind.value == "local" or data is None:
        return ""
    for dataset in data.entries().values():
        root = dataset.get("root")
        if root is None or not isinstance(root.value, str) or not root.value:
            continue
        source = _source(dataset, root.value)
        if os.path.isabs(source) and not os.path.exists(source):
            return source
    return ""


def _refuse_rehearsal_of_weights(tree: Node, rehearse: bool) -> None:
    if rehearse and tree.get("model") is None:
        cause = "nothing to rehearse: the job starts from a network that was trained elsewhere"
        raise ConfigError(cause, place=tree.origin, remedy="run it without --rehearse")


def _without_sources(tree: Node, *, only_unset: bool) -> Node:
    """Remove the places of the datasets: the folders are not read, nor are their ${VAR} needed.

    ``only_unset``: those that name an unset variable, of a job that is planned.
    """
    data = tree.get("data")
    origin = PLANNED if only_unset else REHEARSE
    for name in data.entries() if data is not None else ():
        for key in ("root", "prepared"):
            place = tree.get("data", name, key)
            # A dataset without a root gets an empty one: of a rehearsal it is synthetic.
            if place is None and key == "prepared":
                continue
            if not only_unset or (place is not None and _names_unset_variable(place)):
                tree = tree.replaced(("data", name, key), Node("", origin))
    return tree


def _names_unset_variable(node: Node) -> bool:
    try:
        references.substituted(node, "")
    except ConfigError:
        return True
    return False


def _with_absolute_paths(tree: Node, folder: Path) -> Node:
    """Make the paths in a job absolute, so that every process finds the files.

    Raises:
        ConfigError: there is no such class list (C6).
    """
    data = tree.get("data")
    for name, dataset in data.entries().items() if data is not None else ():
        tree = _with_path(tree, ("data", name, "root"), partial(_source, dataset))
        tree = _with_path(tree, ("data", name, "prepared"), partial(_source, dataset))
        tree = _with_path(tree, ("data", name, "classes"), partial(_class_list, folder))
    for stage in ORDER:
        tree = _with_path(tree, ("stages", stage, "recipe"), partial(_recipe, folder))
        tree = _with_path(tree, ("stages", stage, "from"), weights_file)
        tree = _with_path(tree, ("stages", stage, "offload_optimizer"), _folder)
    return _with_path(tree, ("checkpoints", "mirror"), _folder)


def _with_path(tree: Node, key: tuple[str, ...], absolute: Callable[[str], str]) -> Node:
    node = tree.get(*key)
    if node is None or not isinstance(node.value, str) or not node.value:
        return tree
    try:
        return tree.replaced(key, Node(absolute(node.value), node.origin))
    except ConfigError as error:
        cause = f"{'.'.join(key)}: {error.cause}"
        raise ConfigError(cause, place=node.origin, remedy=error.remedy) from None


def _source(dataset: Node, root: str) -> str:
    layout = dataset.get("layout")
    path = os.path.expanduser(root)
    is_hugging_face = layout is not None and layout.value == "huggingface"
    # URLs stay, and so do names of datasets on the Hugging Face hub ("user/dataset").
    if "://" in root or (is_hugging_face and not os.path.exists(path)):
        return root
    return os.path.abspath(path)


def _folder(path: str) -> str:
    # A URL stays, and so does a word of the key: none, cpu.
    is_word = "://" in path or path in ("none", "cpu")
    return path if is_word else os.path.abspath(os.path.expanduser(path))


def _class_list(folder: Path, listed: str) -> str:
    if listed == "auto":
        return listed
    # A shipped list keeps its name, so that run.yaml reads the same on every machine.
    path = class_lists.find(listed, folder)
    return listed if path.parent == class_lists.FOLDER else os.path.abspath(path)


def _recipe(folder: Path, name: str) -> str:
    # Shipped recipes keep their names; the user's own become paths, because run.yaml is not read
    # from the job file's folder.
    path = references.Fragments(folder).find("recipe", name)
    return name if path is None or path.parent == CONFIGS / "recipe" else os.path.abspath(path)


def _empty_stages(tree: Node) -> list[str]:
    """Notes about stages without a value, which YAML reads as null: `export:` runs nothing."""
    stages = tree.get("stages")
    return [
        f"{node.origin}: stages.{name} is empty and will not run; "
        f"write {name}: {{}} for its defaults"
        for name, node in (stages.entries().items() if stages is not None else ())
        if node.value is None
    ]
