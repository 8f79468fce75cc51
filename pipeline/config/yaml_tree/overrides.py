"""``--set a.b.c=value``: changes to a job from the command line, before references are replaced."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.schema_text import describe
from pipeline.config.yaml_tree.reading import FROM_COMMAND_LINE as ORIGIN
from pipeline.config.yaml_tree.reading import Node, parse
from pipeline.config.yaml_tree.references import ONLY, name_the_dataset
from pipeline.errors import ConfigError
from pipeline.suggest import did_you_mean


def _split(override: str) -> tuple[list[str], str]:
    key, equals, text = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise ConfigError(
            f"'{override}' is not KEY=VALUE",
            place=ORIGIN,
            remedy="for example --set stages.pretrain.epochs=10",
        )
    return path, text


def _value(text: str, known: describe.Field, override: str) -> Node:
    """Where a key holds text, what is given is taken as it is, unless it is quoted; anything else is YAML."""
    if known.schema.get("type") == "string" and text.strip()[:1] not in ('"', "'"):
        return Node(text.strip(), ORIGIN)
    try:
        return parse(text, ORIGIN) or Node(None, ORIGIN)
    except ConfigError as error:
        raise ConfigError(
            f"'{override}': {error.cause}", place=ORIGIN, remedy=error.remedy
        ) from None


def _dataset(tree: Node, path: list[str], override: str) -> list[str]:
    """``data.root`` means the root of the only dataset."""
    names = list((tree.get("data") or Node({}, ORIGIN)).entries())
    if (
        len(path) < 2
        or path[0] != "data"
        or path[1] in names
        or not describe.is_dataset_key(path[1])
    ):
        return path
    if len(names) > 1:
        choices = ", ".join(f"data.{name}.{'.'.join(path[1:])}" for name in names)
        raise ConfigError(
            f"'{override}': the job has {len(names)} datasets",
            place=ORIGIN,
            remedy=f"say which: {choices}",
        )
    return ["data", names[0] if names else ONLY, *path[1:]]


def _is_reference(path: Sequence[str]) -> bool:
    return path in (["model"], ["cluster"]) or (len(path) == 2 and path[0] == "data")


def _find(path: list[str], override: str) -> describe.Field:
    """The key of an override; an unknown one is told here, with the key that was meant."""
    known = describe.root()
    for depth, key in enumerate(path):
        child = known.child(key)
        if child is None and key == "base" and _is_reference(path[:depth]):
            return describe.Field(tuple(path), {"type": "string"})
        if child is None:
            where = ".".join(path[:depth])
            cause = f"'{override}': there is no key '{key}'" + (f" in {where}" if where else "")
            whole = f"{where} is {known.expectation}: give it whole"
            raise ConfigError(
                cause,
                place=ORIGIN,
                remedy=did_you_mean(key, known.keys, "keys here") if known.keys else whole,
            )
        known = child
    return known


def apply(tree: Node, overrides: Sequence[str]) -> Node:
    """The job with every ``--set`` applied in order; a later one wins. Raises ConfigError."""
    for override in overrides:
        path, text = _split(override)
        if len(path) > 1:
            tree = name_the_dataset(tree)
            path = _dataset(tree, path, override)
        value = _value(text, _find(path, override), override)
        for depth in range(1, len(path)):
            node = tree.get(*path[:depth])
            if node is None or node.value is None or isinstance(node.value, dict):
                continue
            if not (isinstance(node.value, str) and _is_reference(path[:depth])):
                cause = f"{'.'.join(path[:depth])} is not a mapping"
                raise ConfigError(cause, place=node.origin, remedy="write `key: value` lines")
            tree = tree.replaced(
                tuple(path[:depth]), Node({"base": node}, node.origin)
            )  # `model: {base: name, ...}`
        tree = tree.replaced(tuple(path), value)
    return tree
