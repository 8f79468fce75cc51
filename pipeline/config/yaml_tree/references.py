"""Replaces references: names of files in ``configs/<kind>/`` and environment variables.

    model: revcol_huge                               content of configs/model/revcol_huge.yaml
    model: {base: revcol_huge, drop_path: 0.4}       the same, with one value changed
    pretrain: {recipe: pretrain_22k, base_lr: 2e-4}  a recipe with one value changed
    root: "${IMAGENET1K:-/data/in1k}"                environment variable, with a default

A folder ``configs`` beside the job file is searched before the shipped one. A name that contains
``/`` is a path relative to the job file.

Worked example: ``model: {base: mine, drop_path: 0.4}`` where configs/model/mine.yaml holds
``{base: revcol_tiny, columns: 6}``:

    revcol_tiny.yaml   channels [64, 128, 256, 512], depths [2, 2, 4, 2], columns 4, drop_path 0.1
    mine.yaml          columns 6                     overrides revcol_tiny
    the job file       drop_path 0.4                 overrides both
    result             channels and depths of revcol_tiny, columns 6, drop_path 0.4

Each value keeps the file and line where it was written.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.job_queries import TRAINING
from pipeline.config.schema_text import describe
from pipeline.config.yaml_tree.diagnostics import Problem, problem_of, raise_problems
from pipeline.config.yaml_tree.old_names import replace_old_names
from pipeline.config.yaml_tree.reading import Node, display_path, read_mapping, scalar
from pipeline.errors import ConfigError
from pipeline.shipped import CONFIGS
from pipeline.suggest import did_you_mean

ONLY = "images"  # name of a dataset that is written without one

# Everything from "${" to the next "}", correct or not, so that a mistake is reported.
_VARIABLE = re.compile(r"\$\{([^}]*)(\}?)")
_INSIDE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-([^$]*))?")  # NAME or NAME:-default


def merge(under: Node, over: Node) -> Node:
    """``over`` on top of ``under``: mappings are merged key by key, other values are replaced.

    Example: {epochs: 9, augment: {flip: 0.5, mixup: 0.8}} under {augment: {mixup: 0}} gives
    {epochs: 9, augment: {flip: 0.5, mixup: 0}}.
    """
    if not (isinstance(under.value, dict) and isinstance(over.value, dict)):
        return over
    entries = dict(under.value)
    for key, node in over.value.items():
        entries[key] = merge(entries[key], node) if key in entries else node
    return Node(entries, over.origin)


@dataclasses.dataclass(frozen=True)
class Fragments:
    """The files that references name.

    ``old_names``: collects keys and values in these files that were renamed since.
    """

    job_folder: Path
    old_names: list[Problem] = dataclasses.field(default_factory=list)

    @property
    def folders(self) -> list[Path]:
        """The folders to search; the first that has the file wins."""
        # A job inside the checkout has the shipped folder beside its parent; do not list it twice.
        own = self.job_folder / "configs"
        return [own, CONFIGS] if own.is_dir() and own.resolve() != CONFIGS else [CONFIGS]

    def names(self, kind: str) -> list[str]:
        """The names that a reference of this kind can have."""
        return sorted(
            {path.stem for folder in self.folders for path in (folder / kind).glob("*.yaml")}
        )

    def find(self, kind: str, name: str) -> Path | None:
        """The file that a name refers to, or None."""
        if "/" in name or name.endswith(".yaml"):
            candidates = [self.job_folder / name, Path(name)]
        else:
            candidates = [folder / kind / f"{name}.yaml" for folder in self.folders]
        return next((path for path in candidates if path.is_file()), None)

    def expand(self, kind: str, node: Node, key: str, chain: tuple[Path, ...] = ()) -> Node:
        """Replace a name, or the ``base`` of a mapping, by the content of its file.

        Raises:
            ConfigError: see ``load``.
        """
        if isinstance(node.value, str):
            node = Node({"base": node}, node.origin)
        base = node.entries().get("base")
        if base is None:
            return node
        own = {name: below for name, below in node.entries().items() if name != "base"}
        return merge(self.load(kind, base, key, chain), Node(own, node.origin))

    def load(self, kind: str, name: Node, key: str, chain: tuple[Path, ...] = ()) -> Node:
        """The mapping of the file that ``name`` refers to, its own ``base`` included.

        Args:
            key: the key whose value is the reference, for messages.
            chain: the files that led here, to detect files that include each other.

        Raises:
            ConfigError: no such file, or a file includes itself (C6).
        """
        # `model: ${MODEL}` works: variables in references are replaced before all others.
        name = substituted(name, key)
        if not isinstance(name.value, str) or not name.value:
            cause = f"{key}: expected the name of a file in configs/{kind}, given {name.data()!r}"
            remedy = did_you_mean("", self.names(kind), "files there")
            raise ConfigError(cause, place=name.origin, remedy=remedy)
        path = self.find(kind, name.value)
        if path is None:
            file = name.value if "/" in name.value else f"configs/{kind}/{name.value}.yaml"
            remedy = did_you_mean(name.value, self.names(kind), f"files in configs/{kind}")
            raise ConfigError(f"{key}: there is no file {file}", place=name.origin, remedy=remedy)
        path = path.resolve()
        # a.yaml -> b.yaml -> a.yaml: resolved paths also catch loops through links and "../".
        if path in chain:
            loop = " -> ".join(display_path(file) for file in (*chain[chain.index(path) :], path))
            cause = f"{key}: the files include each other: {loop}"
            raise ConfigError(cause, place=name.origin, remedy="remove one `base`")
        # A recipe belongs to the stage around the key `recipe`; other files to the key itself.
        section = describe.find(key.removesuffix(".recipe").split("."))
        mapping = read_mapping(path)
        if section is not None:
            mapping = replace_old_names(mapping, section, self.old_names)
        return self.expand(kind, mapping, key, (*chain, path))


def name_the_dataset(tree: Node) -> Node:
    """Give a single dataset without a name its name: ``data: {...}`` -> ``data: {images: ...}``."""
    data = tree.get("data")
    if data is None or not (isinstance(data.value, str) or _is_dataset(data.entries())):
        return tree
    return tree.replaced(("data",), Node({ONLY: data}, data.origin))


def _is_dataset(entries: dict[str, Node]) -> bool:
    """True if these are the keys of a dataset (mistyped ones included), not datasets by name."""
    return any(describe.is_dataset_key(key) for key in entries)


def expand(tree: Node, fragments: Fragments) -> Node:
    """Replace every reference to a file in a job.

    Raises:
        ConfigError: see ``Fragments.load``.
    """
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
            # The recipe goes underneath: keys of the job override it.
            under = fragments.load("recipe", recipe, f"stages.{stage}.recipe")
            tree = tree.replaced(("stages", stage), merge(under, node))
    return tree


def substituted(node: Node, key: str) -> Node:
    """A scalar with its ``${VAR}`` and ``${VAR:-default}`` replaced; other nodes unchanged.

    Examples, with DISK=/data, EMPTY="" and NONE not set:

        ${DISK}/in1k       /data/in1k
        ${EMPTY:-x}        x             as in a shell, an empty variable takes the default too
        ${NONE:-11}        11            a number if it is not in quotes
        ${NONE}            ConfigError

    Raises:
        ConfigError: a variable is not set and has no default, or "${" without a correct end (C9).
    """
    if not isinstance(node.value, str) or "${" not in node.value:
        return node

    def variable_value(match: re.Match[str]) -> str:
        inside = _INSIDE.fullmatch(match[1])
        if inside is None or not match[2]:
            cause = f"{key}: '{match[0]}' is not a substitution"
            raise ConfigError(cause, place=node.origin, remedy="write ${NAME} or ${NAME:-default}")
        name, default = inside.groups()
        value = os.environ.get(name)
        if value is None and default is None:
            cause = f"{key}: the environment variable {name} is not set"
            remedy = f"export {name}=..., or add --set {key}=VALUE"
            raise ConfigError(cause, place=node.origin, remedy=remedy)
        return value or default or ""

    # A quoted "${N}" stays text; an unquoted ${N} is typed again: "5" becomes the number 5.
    text = _VARIABLE.sub(variable_value, node.value)
    return dataclasses.replace(node, value=scalar(text) if node.plain else text)


def substitute(tree: Node) -> Node:
    """Apply ``substituted`` to every scalar of a tree.

    Raises:
        ConfigError: names every variable that is not set, not only the first.
    """
    # Collect instead of raising: on a new machine usually several variables are missing at once.
    problems: list[Problem] = []

    def walk(node: Node, path: Sequence[str]) -> Node:
        if isinstance(node.value, dict):
            entries = {key: walk(below, (*path, key)) for key, below in node.value.items()}
            return Node(entries, node.origin)
        if isinstance(node.value, list):
            return Node([walk(item, path) for item in node.value], node.origin)
        try:
            return substituted(node, ".".join(path))
        except ConfigError as error:
            problems.append(problem_of(error))
            return node

    result = walk(tree, ())
    raise_problems(problems)
    return result
