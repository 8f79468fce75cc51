"""``--set a.b.c=value``: changes to a job from the command line, before references are replaced."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import describe
from pipeline.config.problems import did_you_mean
from pipeline.config.references import ONLY, TRAINING, name_the_dataset
from pipeline.config.source import Node, parse
from pipeline.errors import ConfigError

ORIGIN = "--set"


def _split(override: str) -> tuple[list[str], Node]:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"'{override}' is not KEY=VALUE", place=ORIGIN, remedy="for example --set stages.pretrain.epochs=10")
    return path, parse(text, ORIGIN) or Node(None, ORIGIN)


def _dataset(tree: Node, path: list[str], override: str) -> list[str]:
    """``data.root`` means the root of the only dataset."""
    names = list((tree.get("data") or Node({}, ORIGIN)).entries())
    if len(path) < 2 or path[0] != "data" or path[1] in names or not describe.single_dataset([path[1]]):
        return path
    if len(names) > 1:
        choices = ", ".join(f"data.{name}.{'.'.join(path[1:])}" for name in names)
        raise ConfigError(f"'{override}': the job has {len(names)} datasets", place=ORIGIN, remedy=f"say which: {choices}")
    return ["data", names[0] if names else ONLY, *path[1:]]


def _is_reference(path: Sequence[str]) -> bool:
    return path in (["model"], ["cluster"]) or (len(path) == 2 and path[0] == "data")


def _check(tree: Node, path: list[str], override: str) -> None:
    """An unknown key is told here, with the key that was meant."""
    known = describe.root()
    for depth, key in enumerate(path):
        child = known.child(key)
        if child is None and key == "base" and _is_reference(path[:depth]):
            return
        if child is None:
            where = ".".join(path[:depth])
            cause = f"'{override}': there is no key '{key}'" + (f" in {where}" if where else "")
            remedy = did_you_mean(key, known.keys, "keys here") if known.keys else f"{where} holds {known.expectation}: give it whole"
            raise ConfigError(cause, place=ORIGIN, remedy=remedy)
        known = child
    for depth in range(1, len(path)):
        node = tree.get(*path[:depth])
        if node is not None and node.value is not None and not isinstance(node.value, dict) and not _is_reference(path[:depth]):
            raise ConfigError(f"'{override}': {'.'.join(path[:depth])} is not a mapping", place=ORIGIN, remedy="give it whole")


def apply(tree: Node, overrides: Sequence[str]) -> Node:
    """The job with every ``--set`` applied in order; a later one wins. Raises ConfigError."""
    for override in overrides:
        path, value = _split(override)
        if len(path) > 1:
            tree = name_the_dataset(tree)
            path = _dataset(tree, path, override)
        _check(tree, path, override)
        for depth in range(1, len(path)):
            node = tree.get(*path[:depth])
            if node is not None and isinstance(node.value, str):  # a reference gets a change: `model: {base: name, ...}`
                tree = tree.replaced(tuple(path[:depth]), Node({"base": node}, node.origin))
        tree = tree.replaced(tuple(path), value)
    return tree


def training_stages(tree: Node) -> list[str]:
    """The training stages that a job has."""
    return [stage for stage in TRAINING if (node := tree.get("stages", stage)) is not None and node.value is not None]
