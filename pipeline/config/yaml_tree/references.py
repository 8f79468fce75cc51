"""References: names of files in ``configs/<kind>/`` become that file's mapping; ``${VAR}`` becomes the environment's value.

    model: revcol_huge                          the file
    model: {base: revcol_huge, drop_path: 0.4}  the file, with changes
    pretrain: {recipe: pretrain_22k, base_lr: 2e-4}  a recipe underneath a stage's own keys

A folder ``configs`` beside the job file is looked into before the shipped one; a name with a ``/`` is a path.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.job_queries import TRAINING
from pipeline.config.schema_text import describe
from pipeline.config.yaml_tree.diagnostics import Problem, refuse
from pipeline.config.yaml_tree.reading import Node, read_mapping, scalar, shown
from pipeline.errors import ConfigError
from pipeline.shipped import CONFIGS
from pipeline.suggest import did_you_mean

ONLY = "images"  # the name of a dataset that is written without one

_VARIABLE = re.compile(r"\$\{([^}]*)(\}?)")
_INSIDE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-([^$]*))?")


def merge(under: Node, over: Node) -> Node:
    """``over`` on top of ``under``: mappings are merged key by key, anything else is replaced."""
    if not (isinstance(under.value, dict) and isinstance(over.value, dict)):
        return over
    entries = dict(under.value)
    for key, node in over.value.items():
        entries[key] = merge(entries[key], node) if key in entries else node
    return Node(entries, over.origin)


@dataclasses.dataclass(frozen=True)
class Fragments:
    """The folders that references are looked up in; the first that has the file wins."""

    job_folder: Path

    @property
    def folders(self) -> list[Path]:
        own = self.job_folder / "configs"
        return [own, CONFIGS] if own.is_dir() and own.resolve() != CONFIGS else [CONFIGS]

    def names(self, kind: str) -> list[str]:
        """The names that a reference of this kind can have."""
        return sorted(
            {path.stem for folder in self.folders for path in (folder / kind).glob("*.yaml")}
        )

    def find(self, kind: str, name: str) -> Path | None:
        """The file that a name stands for."""
        if "/" in name or name.endswith(".yaml"):
            places = [self.job_folder / name, Path(name)]
        else:
            places = [folder / kind / f"{name}.yaml" for folder in self.folders]
        return next((place for place in places if place.is_file()), None)

    def expand(self, kind: str, node: Node, key: str, chain: tuple[Path, ...] = ()) -> Node:
        """Replace a name, or a mapping's ``base``, by the file's mapping underneath the rest. Raises ConfigError."""
        if isinstance(node.value, str):
            node = Node({"base": node}, node.origin)
        base = node.entries().get("base")
        if base is None:
            return node
        rest = Node(
            {name: one for name, one in node.entries().items() if name != "base"}, node.origin
        )
        return merge(self.load(kind, base, key, chain), rest)

    def load(self, kind: str, name: Node, key: str, chain: tuple[Path, ...] = ()) -> Node:
        """The mapping of the file that ``name`` stands for, its own ``base`` included. Raises ConfigError (C6)."""
        name = substituted(name, key)
        if not isinstance(name.value, str) or not name.value:
            cause = f"{key}: expected the name of a file in configs/{kind}, given {name.data()!r}"
            raise ConfigError(
                cause, place=name.origin, remedy=did_you_mean("", self.names(kind), "files there")
            )
        path = self.find(kind, name.value)
        if path is None:
            file = name.value if "/" in name.value else f"configs/{kind}/{name.value}.yaml"
            remedy = did_you_mean(name.value, self.names(kind), f"files in configs/{kind}")
            raise ConfigError(f"{key}: there is no file {file}", place=name.origin, remedy=remedy)
        path = path.resolve()
        if path in chain:
            loop = " -> ".join(shown(one) for one in (*chain[chain.index(path) :], path))
            raise ConfigError(
                f"{key}: the files include each other: {loop}",
                place=name.origin,
                remedy="take one `base` away",
            )
        return self.expand(kind, read_mapping(path), key, (*chain, path))


def name_the_dataset(tree: Node) -> Node:
    """``data`` of one dataset written without a name becomes ``data: {images: ...}``."""
    data = tree.get("data")
    if data is None or not (isinstance(data.value, str) or _is_dataset(data.entries())):
        return tree
    return tree.replaced(("data",), Node({ONLY: data}, data.origin))


def _is_dataset(entries: dict[str, Node]) -> bool:
    """Whether these are the keys of a dataset, mistyped ones among them, rather than datasets by name."""
    return any(describe.is_dataset_key(key) for key in entries)


def expand(tree: Node, fragments: Fragments) -> Node:
    """Replace every reference of a job. Raises ConfigError."""
    tree = name_the_dataset(tree)
    for kind in ("model", "cluster"):
        if node := tree.get(kind):
            tree = tree.replaced((kind,), fragments.expand(kind, node, kind))
    data = tree.get("data")
    for name, node in data.entries().items() if data is not None else ():
        tree = tree.replaced(("data", name), fragments.expand("data", node, f"data.{name}"))
    for stage in TRAINING:
        node = tree.get("stages", stage)
        recipe = tree.get("stages", stage, "recipe")
        if node is not None and recipe is not None and recipe.value:
            under = fragments.load("recipe", recipe, f"stages.{stage}.recipe")
            tree = tree.replaced(("stages", stage), merge(under, node))
    return tree


def substituted(node: Node, key: str) -> Node:
    """A scalar with its ``${VAR}`` and ``${VAR:-default}`` replaced. Raises ConfigError where a variable is not set (C9)."""
    if not isinstance(node.value, str) or "${" not in node.value:
        return node

    def value(match: re.Match[str]) -> str:
        inside = _INSIDE.fullmatch(match[1])
        if inside is None or not match[2]:
            cause = f"{key}: '{match[0]}' is not a substitution"
            raise ConfigError(cause, place=node.origin, remedy="write ${NAME} or ${NAME:-default}")
        name, default = inside.groups()
        found = os.environ.get(name)
        if found is None and default is None:
            cause = f"{key}: the environment variable {name} is not set"
            raise ConfigError(
                cause, place=node.origin, remedy=f"export {name}=..., or add --set {key}=VALUE"
            )
        return default if not found and default is not None else found or ""

    text = _VARIABLE.sub(value, node.value)
    return dataclasses.replace(node, value=scalar(text) if node.plain else text)


def substitute(tree: Node) -> Node:
    """``substituted`` for a whole tree; raises one ConfigError that names every variable that is not set."""
    problems: list[Problem] = []

    def walk(node: Node, path: Sequence[str]) -> Node:
        if isinstance(node.value, dict):
            return Node(
                {key: walk(one, (*path, key)) for key, one in node.value.items()}, node.origin
            )
        if isinstance(node.value, list):
            return Node([walk(one, path) for one in node.value], node.origin)
        try:
            return substituted(node, ".".join(path))
        except ConfigError as error:
            problems.append(Problem(error.place, error.cause, error.remedy))
            return node

    result = walk(tree, ())
    refuse(problems)
    return result
