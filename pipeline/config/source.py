"""YAML text -> a tree that knows the file and line of every key and value.

Plain YAML 1.2 scalars: ``1e-4`` is a number, ``yes`` and ``2024-01-01`` are text. YAML is data here: tags such as
``!!python/object`` are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import yaml

from pipeline.config.problems import Problem, did_you_mean, refuse
from pipeline.errors import ConfigError

MAX_NODES = 100_000  # a job has hundreds; aliases of aliases can grow without bound

Value = Union[None, bool, int, float, str, list["Node"], dict[str, "Node"]]


@dataclass(frozen=True)
class Node:
    """A YAML value and where it was written ("file:line"; of a mapping's entry, the line of its key)."""

    value: Value
    origin: str
    plain: bool = False  # an unquoted scalar: its type is decided again after ${VAR} has been replaced

    def entries(self) -> dict[str, Node]:
        """The entries of a mapping; none for anything else."""
        return self.value if isinstance(self.value, dict) else {}

    def get(self, *path: str) -> Node | None:
        """The node at a path of keys, or None."""
        node: Node | None = self
        for key in path:
            node = node.entries().get(key) if node is not None else None
        return node

    def replaced(self, path: tuple[str, ...], new: Node | None) -> Node:
        """A copy with the node at ``path`` replaced (None: taken away); mappings on the way are made where missing."""
        if not path:
            return new if new is not None else self
        entries = dict(self.entries())
        if len(path) == 1 and new is None:
            entries.pop(path[0], None)
        else:
            below = entries.get(path[0], Node({}, new.origin if new else self.origin))
            entries[path[0]] = below.replaced(path[1:], new)
        return Node(entries, self.origin)

    def data(self) -> Any:
        """The bare values, as ``json`` would load them."""
        if isinstance(self.value, dict):
            return {key: node.data() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.data() for node in self.value]
        return self.value

    def leaves(self, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Node]]:
        """Every value that is not a mapping, with its path."""
        if isinstance(self.value, dict):
            for key, node in self.value.items():
                yield from node.leaves((*path, key))
        else:
            yield path, self


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The C parser where PyYAML has it, with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}


_PREFIX = "tag:yaml.org,2002:"
_SCALARS = (  # tag, pattern, first characters
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
)
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_PREFIX + _tag, re.compile(f"^(?:{_pattern})$"), _first)


def shown(path: Path) -> str:
    """A path as messages name it: relative to the current folder where it lies below it."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return absolute if relative.startswith("..") else relative


def scalar(text: str) -> Value:
    """The value of an unquoted scalar."""
    for tag, pattern, _ in _SCALARS:
        if re.fullmatch(pattern, text):
            return _convert(_PREFIX + tag, text)
    return text


def _convert(tag: str, text: str) -> Value:
    kind = tag.removeprefix(_PREFIX)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, 16) if text.startswith("0x") else int(text.replace("_", ""))
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


class _Reader:
    """Turns composed YAML nodes into ours and gathers what is wrong on the way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.problems: list[Problem] = []
        self.count = 0

    def at(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.name != "--set" else self.name

    def read(self, node: yaml.Node, origin: str, above: tuple[yaml.Node, ...] = ()) -> Node:
        self.count += 1
        if self.count > MAX_NODES:
            raise ConfigError(f"more than {MAX_NODES} values", place=self.name, remedy="is this a job file? look for repeated aliases")
        if any(node is one for one in above):
            self.problems.append(Problem(self.at(node), "an alias that contains itself", "write the value out"))
            return Node(None, origin)
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, (*above, node)), origin)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.read(item, self.at(item), (*above, node)) for item in node.value], origin)
        known = [_PREFIX + tag for tag, _, _ in _SCALARS] + [_PREFIX + "str"]
        if node.tag not in known:
            cause = f"the YAML tag '{node.tag}' is not allowed: a job is plain data"
            self.problems.append(Problem(self.at(node), cause, "take the tag away"))
            return Node(None, origin)
        plain = node.style is None or node.style == ""
        return Node(_convert(node.tag, node.value) if plain else node.value, origin, plain)

    def _mapping(self, node: yaml.MappingNode, above: tuple[yaml.Node, ...]) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(self.at(key_node), "a key must be a single word", "write `key: value`"))
                continue
            key, origin = str(key_node.value), self.at(key_node)
            if key in entries:
                cause = f"the key '{key}' is written twice (first at {entries[key].origin})"
                self.problems.append(Problem(origin, cause, "keep one of them"))
                continue
            entries[key] = self.read(value_node, origin, above)
        return entries


def parse(text: str, name: str) -> Node | None:
    """Read one YAML document; None where there is nothing in it. ``name`` stands for the file in messages.

    Raises ConfigError with file:line for anything that is not plain YAML, and for duplicate keys.
    """
    try:
        composed = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise _syntax(error, text, name) from None
    except RecursionError:
        raise ConfigError("nested too deeply", place=name, remedy="is this a job file?") from None
    if composed is None:
        return None
    reader = _Reader(name)
    node = reader.read(composed, reader.at(composed))
    refuse(reader.problems)
    return node


def _syntax(error: yaml.YAMLError, text: str, name: str) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark is not None else 1
    lines = text.splitlines()
    for number, content in enumerate(lines[:line], 1):
        if re.match(r"[ ]*\t\s*\S", content):
            return ConfigError("indented with a tab", place=f"{name}:{number}", remedy="YAML is indented with spaces only")
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    here = lines[line - 1] if 0 < line <= len(lines) else ""
    remedy = 'put the value in quotes: "${NAME}"' if "${" in here else "look at this line and the one above: a colon, a quote or a bracket"
    place = name if name == "--set" else f"{name}:{line}"
    return ConfigError(f"not readable as YAML: {problem}", place=place, remedy=remedy)


def read_mapping(path: Path) -> Node:
    """Read a YAML file that holds a mapping.

    Raises ConfigError (missing, empty, not UTF-8, not a mapping, not YAML) naming the file and, where it can, the line.
    """
    name = shown(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        siblings = [str(one.relative_to(path.parent)) for one in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        remedy = did_you_mean(path.name, siblings, f"YAML files in {shown(path.parent)}")
        raise ConfigError(f"cannot be read: {error.strerror}", place=name, remedy=remedy) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"byte 0x{content[error.start]:02x} is not UTF-8 text", place=f"{name}:{line}", remedy="save the file as UTF-8"
        ) from None
    node = parse(text, name)
    if node is None:
        raise ConfigError("is empty", place=name, remedy="a job names its model, data and stages: see jobs/quickstart.yaml")
    if not isinstance(node.value, dict):
        kind = "a list" if isinstance(node.value, list) else "a single value"
        raise ConfigError(f"holds {kind}, not a mapping", place=node.origin, remedy="write `key: value` lines")
    return node
