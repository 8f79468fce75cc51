"""Applies ``--set KEY=VALUE`` to a job, before references are replaced.

Worked example, for a job with ``model: revcol_tiny`` and one dataset ``toy``:

    --set model.drop_path=0.3    model: {base: revcol_tiny, drop_path: 0.3}
    --set data.root=/images      data.toy.root: "/images"; the only dataset needs no name
    --set name=2024              name: "2024"; keys that hold text take the value literally
    --set seed=7                 seed: 7; all other values are YAML
    --set stages.finetune=null   removes the stage
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.schema_text import describe, suggestions
from pipeline.config.yaml_tree.diagnostics import Problem, raise_problems
from pipeline.config.yaml_tree.old_names import replace_old_names
from pipeline.config.yaml_tree.reading import FROM_COMMAND_LINE as ORIGIN
from pipeline.config.yaml_tree.reading import Node, parse
from pipeline.config.yaml_tree.references import ONLY, name_the_dataset
from pipeline.errors import ConfigError


def apply(tree: Node, overrides: Sequence[str]) -> Node:
    """The job with every ``--set`` applied in order; a later one wins.

    Raises:
        ConfigError: not KEY=VALUE, no such key, a renamed key, or a value that is not YAML.
    """
    for override in overrides:
        path, text = _split(override)
        # `--set data=imagenet1k` replaces the whole section and needs no dataset name.
        if len(path) > 1:
            tree = name_the_dataset(tree)
            path = _with_dataset_name(tree, path, override)
        key = _find(path, text, override)
        tree = _with_mappings_above(tree, path)
        tree = tree.replaced(tuple(path), _value(text, key, override))
    return tree


def _split(override: str) -> tuple[list[str], str]:
    """ "stages.pretrain.epochs=3" -> (["stages", "pretrain", "epochs"], "3")."""
    key, equals, text = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        cause = f"'{override}' is not KEY=VALUE"
        remedy = "for example --set stages.pretrain.epochs=10"
        raise ConfigError(cause, place=ORIGIN, remedy=remedy)
    return path, text


def _with_dataset_name(tree: Node, path: list[str], override: str) -> list[str]:
    """``data.root`` -> ``data.toy.root``, if toy is the only dataset."""
    names = list((tree.get("data") or Node({}, ORIGIN)).entries())
    if len(path) < 2 or path[0] != "data" or path[1] in names:
        return path
    if not suggestions.means_dataset_key(path[1]):
        return path
    if len(names) > 1:
        cause = f"'{override}': the job has {len(names)} datasets"
        choices = ", ".join(f"data.{name}.{'.'.join(path[1:])}" for name in names)
        raise ConfigError(cause, place=ORIGIN, remedy=f"choose one: {choices}")
    return ["data", names[0] if names else ONLY, *path[1:]]


def _find(path: list[str], text: str, override: str) -> describe.SchemaKey:
    """The schema's key at ``path``.

    Raises:
        ConfigError: there is no such key, or it was renamed; with the right key as the remedy.
    """
    key = describe.root()
    renamed: list[str] = []
    for depth, part in enumerate(path):
        new = key.new_name(part)
        if new is not None:
            renamed.append(f"'{part}' was renamed to '{new}'")
        child = key.child(new or part)
        # `base` is not in the schema, because references are replaced before validation.
        if child is None and part == "base" and _is_reference(path[:depth]):
            child = describe.SchemaKey(tuple(path), {"type": "string"})
        if child is None:
            raise _unknown_key(key, part, override)
        key = child
    # Walk to the end before reporting: the remedy spells the whole new key.
    if renamed:
        cause = f"'{override}': {', '.join(renamed)}"
        raise ConfigError(cause, place=ORIGIN, remedy=f"--set {key.dotted}={text.strip()}")
    return key


def _unknown_key(section: describe.SchemaKey, part: str, override: str) -> ConfigError:
    where = f" in {section.dotted}" if section.path else ""
    cause = f"'{override}': there is no key '{part}'{where}"
    remedy = f"{section.dotted} is {section.expectation}: set it as a whole"
    if section.keys:
        remedy = suggestions.remedy(part, section)
    return ConfigError(cause, place=ORIGIN, remedy=remedy)


def _is_reference(path: Sequence[str]) -> bool:
    """True for keys whose value may be the name of a file."""
    return path in (["model"], ["cluster"]) or (len(path) == 2 and path[0] == "data")


def _with_mappings_above(tree: Node, path: list[str]) -> Node:
    """Make every section above ``path`` a mapping: ``model: name`` -> ``model: {base: name}``."""
    for depth in range(1, len(path)):
        above = path[:depth]
        node = tree.get(*above)
        if node is None or node.value is None or isinstance(node.value, dict):
            continue
        # `seed: 5` with --set seed.x=1 fails earlier; this is a job file with `stages: 5`.
        if not (isinstance(node.value, str) and _is_reference(above)):
            cause = f"{'.'.join(above)} is not a mapping"
            raise ConfigError(cause, place=node.origin, remedy="write `key: value` lines")
        tree = tree.replaced(tuple(above), Node({"base": node}, node.origin))
    return tree


def _value(text: str, key: describe.SchemaKey, override: str) -> Node:
    """The value of an override: literal for a key that holds text, unless quoted; else YAML."""
    if key.schema.get("type") == "string" and text.strip()[:1] not in ('"', "'"):
        node = Node(text.strip(), ORIGIN)
    else:
        node = _parsed(text, override)
    old_names: list[Problem] = []
    node = replace_old_names(node, key, old_names)  # --set stages.pretrain={lr: 1, epochs: 2}
    raise_problems(old_names)
    return node


def _parsed(text: str, override: str) -> Node:
    try:
        return parse(text, ORIGIN) or Node(None, ORIGIN)
    except ConfigError as error:
        cause = f"'{override}': {error.cause}"
        raise ConfigError(cause, place=ORIGIN, remedy=error.remedy) from None
