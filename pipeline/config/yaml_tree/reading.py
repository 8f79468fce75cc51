"""YAML text -> a tree that knows the file and line of every key and value.

Plain YAML 1.2 scalars: ``1e-4`` is a number, ``yes`` and ``2024-01-01`` are text. YAML is data here: tags such as
``!!python/object`` are refused, and what a value is follows from how it is written alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import yaml

from pipeline.config.yaml_tree.diagnostics import Problem, refuse
from pipeline.errors import ConfigError
from pipeline.suggest import did_you_mean

MAX_NODES = 100_000  # a job has hundreds; aliases of aliases can grow without bound
MAX_DEPTH = 30
MAX_DIGITS = 40  # of a whole number; the longest that means anything has half as many
FROM_COMMAND_LINE = "--set"  # the name of a "file" that has no lines

Value: TypeAlias = "bool | int | float | str | list[Node] | dict[str, Node] | None"


@dataclass(frozen=True)
class Node:
    """A YAML value and where it was written ("file:line"; of a mapping's entry, the line of its key)."""

    value: Value
    origin: str
    plain: bool = (
        False  # an unquoted scalar: its type is decided again after ${VAR} has been replaced
    )

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


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The C parser where PyYAML has it, without YAML 1.1's idea of what a scalar is."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


_PREFIX = "tag:yaml.org,2002:"
_TAGS = {
    yaml.ScalarNode: _PREFIX + "str",
    yaml.SequenceNode: _PREFIX + "seq",
    yaml.MappingNode: _PREFIX + "map",
}
_SCALARS: tuple[tuple[str, Callable[[str], Value]], ...] = (  # pattern, what it stands for
    (r"~|null|Null|NULL|", lambda _: None),
    (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    (rf"[-+]?[0-9][0-9_]{{0,{MAX_DIGITS}}}", lambda text: int(text.replace("_", ""))),
    (rf"0x[0-9a-fA-F]{{1,{MAX_DIGITS}}}", lambda text: int(text, 16)),
    (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    (r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", lambda text: float(text.replace(".", ""))),
)


def shown(path: Path) -> str:
    """A path as messages name it: relative to the current folder where it lies below it."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return absolute if relative.startswith("..") else relative


def scalar(text: str) -> Value:
    """The value of an unquoted scalar."""
    return next(
        (convert(text) for pattern, convert in _SCALARS if re.fullmatch(pattern, text)), text
    )


class _Reader:
    """Turns composed YAML nodes into ours and gathers what is wrong on the way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.problems: list[Problem] = []
        self.count = 0

    def at(self, node: yaml.Node) -> str:
        return _place(self.name, node.start_mark.line + 1)

    def read(self, node: yaml.Node, origin: str, above: tuple[yaml.Node, ...] = ()) -> Node:
        self.count += 1
        if self.count > MAX_NODES:
            remedy = "is this a job file? look for repeated aliases"
            raise ConfigError(f"more than {MAX_NODES} values", place=self.name, remedy=remedy)
        if any(node is one for one in above):
            self.problems.append(
                Problem(self.at(node), "an alias that contains itself", "write the value out")
            )
            return Node(None, origin)
        if len(above) > MAX_DEPTH:
            raise ConfigError(
                "nested too deeply", place=self.at(node), remedy="is this a job file?"
            )
        self.refuse_tag(node)
        if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
            self.problems.append(
                Problem(self.at(node), "a NUL character in a value", "take it away")
            )
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, (*above, node)), origin)
        if isinstance(node, yaml.SequenceNode):
            return Node(
                [self.read(item, self.at(item), (*above, node)) for item in node.value], origin
            )
        plain = not node.style
        return Node(scalar(node.value) if plain else node.value, origin, plain)

    def refuse_tag(self, node: yaml.Node) -> None:
        if node.tag != _TAGS[type(node)]:
            cause = f"the YAML tag '{node.tag.replace(_PREFIX, '!!')}' is not allowed: a job is plain data"
            self.problems.append(Problem(self.at(node), cause, "take the tag away"))

    def _mapping(self, node: yaml.MappingNode, above: tuple[yaml.Node, ...]) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(
                    Problem(self.at(key_node), "a key must be a single word", "write `key: value`")
                )
                continue
            self.refuse_tag(key_node)
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
    if composed is None:
        return None
    reader = _Reader(name)
    node = reader.read(composed, reader.at(composed))
    refuse(reader.problems)
    return node


def _place(name: str, line: int) -> str:
    return name if name == FROM_COMMAND_LINE else f"{name}:{line}"


def _syntax(error: yaml.YAMLError, text: str, name: str) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    line = (
        mark.line + 1
        if mark is not None
        else text.count("\n", 0, getattr(error, "position", 0)) + 1
    )
    lines = text.splitlines()
    tabbed = [
        number
        for number, content in enumerate(lines[:line], 1)
        if re.match(r" *\t\s*[^\s#]", content)
    ]
    problem = str(getattr(error, "problem", None) or error).splitlines()[0]
    if tabbed or "tab character" in problem:
        place = _place(name, [line, *tabbed][-1])
        return ConfigError(
            "indented with a tab", place=place, remedy="YAML is indented with spaces only"
        )
    here = lines[line - 1] if line <= len(lines) else ""
    if name == FROM_COMMAND_LINE:
        remedy = "put the value in double quotes inside single ones: --set 'KEY=\"VALUE\"'"
    elif "${" in here:
        remedy = 'put the value in quotes ("${NAME}"), or on a line of its own'
    else:
        remedy = "look at this line and the one above: a colon, a quote or a bracket"
    return ConfigError(f"not readable as YAML: {problem}", place=_place(name, line), remedy=remedy)


def read_mapping(path: Path) -> Node:
    """Read a YAML file that holds a mapping.

    Raises ConfigError (missing, empty, not UTF-8, not a mapping, not YAML) naming the file and, where it can, the line.
    """
    name = shown(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        siblings = (
            [str(one.relative_to(path.parent)) for one in path.parent.glob("*.yaml")]
            if path.parent.is_dir()
            else []
        )
        remedy = did_you_mean(path.name, siblings, f"YAML files in {shown(path.parent)}")
        raise ConfigError(f"cannot be read: {error.strerror}", place=name, remedy=remedy) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _place(name, content.count(b"\n", 0, error.start) + 1)
        cause = f"byte 0x{content[error.start]:02x} is not UTF-8 text"
        raise ConfigError(cause, place=place, remedy="save the file as UTF-8") from None
    node = parse(text, name)
    if node is None:
        raise ConfigError(
            "is empty",
            place=name,
            remedy="a job names its model, data and stages: see jobs/quickstart.yaml",
        )
    if not isinstance(node.value, dict):
        kind = "a list" if isinstance(node.value, list) else "a single value"
        raise ConfigError(
            f"holds {kind}, not a mapping", place=node.origin, remedy="write `key: value` lines"
        )
    return node
