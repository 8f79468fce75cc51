"""Reads YAML text into a tree that knows the file and line of every key and value.

Scalars follow YAML 1.2: ``1e-4`` is a number, ``yes`` and ``2024-01-01`` are text. A job is plain
data: tags such as ``!!python/object`` are refused, and the type of a value follows only from how it
is written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import yaml

from pipeline.config.yaml_tree.diagnostics import Problem, raise_problems
from pipeline.errors import ConfigError
from pipeline.suggest import did_you_mean

MAX_NODES = 100_000  # a job has hundreds; aliases of aliases can grow without bound
MAX_DEPTH = 30
MAX_DIGITS = 40  # of a whole number; the longest meaningful one has half as many
FROM_COMMAND_LINE = "--set"  # name of the "file" that has no lines

Value: TypeAlias = "bool | int | float | str | list[Node] | dict[str, Node] | None"


@dataclass(frozen=True)
class Node:
    """A YAML value and its place ("file:line"; for an entry of a mapping, the line of its key)."""

    value: Value
    origin: str
    plain: bool = False  # unquoted scalar: its type is decided again after ${VAR} is replaced

    @classmethod
    def of(cls, value: Any, origin: str = "") -> Node:
        """The tree of plain values, as ``json`` loads them. Every node has the same origin."""
        if isinstance(value, dict):
            return cls({str(key): cls.of(below, origin) for key, below in value.items()}, origin)
        if isinstance(value, list):
            return cls([cls.of(item, origin) for item in value], origin)
        return cls(value, origin)

    def data(self) -> Any:
        """The plain values, as ``json`` loads them."""
        if isinstance(self.value, dict):
            return {key: node.data() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.data() for node in self.value]
        return self.value

    def entries(self) -> dict[str, Node]:
        """The entries of a mapping; {} for anything else."""
        return self.value if isinstance(self.value, dict) else {}

    def get(self, *path: str) -> Node | None:
        """The node at a path of keys, or None."""
        node: Node | None = self
        for key in path:
            node = node.entries().get(key) if node is not None else None
        return node

    def replaced(self, path: tuple[str, ...], new: Node | None) -> Node:
        """A copy with the node at ``path`` replaced, or removed if ``new`` is None.

        Missing mappings on the way to ``path`` are created.
        """
        if not path:
            return new if new is not None else self
        entries = dict(self.entries())
        if len(path) == 1 and new is None:
            entries.pop(path[0], None)
        else:
            below = entries.get(path[0], Node({}, new.origin if new else self.origin))
            entries[path[0]] = below.replaced(path[1:], new)
        return Node(entries, self.origin)


# The C parser where PyYAML has it. Without resolvers no scalar gets a type from PyYAML, which knows
# YAML 1.1 only ("yes" would be true, "1e-4" text); ``scalar`` below decides instead.
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    yaml_implicit_resolvers: ClassVar[dict[str, object]] = {}


_PREFIX = "tag:yaml.org,2002:"
_TAGS = {
    yaml.ScalarNode: _PREFIX + "str",
    yaml.SequenceNode: _PREFIX + "seq",
    yaml.MappingNode: _PREFIX + "map",
}
# Pattern of an unquoted scalar -> its value. The first match counts; no match: text.
_SCALARS: tuple[tuple[str, Callable[[str], Value]], ...] = (
    (r"~|null|Null|NULL|", lambda _: None),
    (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    (rf"[-+]?[0-9][0-9_]{{0,{MAX_DIGITS}}}", lambda text: int(text.replace("_", ""))),
    (rf"0x[0-9a-fA-F]{{1,{MAX_DIGITS}}}", lambda text: int(text, 16)),
    (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    (r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", lambda text: float(text.replace(".", ""))),
)


def display_path(path: Path) -> str:
    """A path for messages: relative to the current folder if it lies below it."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return absolute if relative.startswith("..") else relative


def scalar(text: str) -> Value:
    """The value of an unquoted scalar: "3" -> 3, "1e-4" -> 0.0001, "yes" -> "yes"."""
    for pattern, convert in _SCALARS:
        if re.fullmatch(pattern, text):
            return convert(text)
    return text


class _Reader:
    """Converts PyYAML's nodes to ours and collects problems on the way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.problems: list[Problem] = []
        self.count = 0

    def read(self, node: yaml.Node, origin: str, ancestors: tuple[yaml.Node, ...] = ()) -> Node:
        """Convert a node. ``ancestors``: the nodes that contain it, outermost first.

        Raises:
            ConfigError: the document is too large or nested too deeply to be a job.
        """
        self._check_size(node, ancestors)
        # `a: &a [1, *a]` contains itself: converting it would never end.
        if any(node is ancestor for ancestor in ancestors):
            self._report(node, "an alias that contains itself", "write the value out")
            return Node(None, origin)
        self._check_tag(node)
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, (*ancestors, node)), origin)
        if isinstance(node, yaml.SequenceNode):
            inside = (*ancestors, node)
            items = [self.read(item, self.origin(item), inside) for item in node.value]
            return Node(items, origin)
        if "\0" in node.value:
            self._report(node, "a NUL character in a value", "remove it")
        # PyYAML gives quoted and block scalars a style ('"', "'", "|", ">"): those are always text.
        plain = not node.style
        return Node(scalar(node.value) if plain else node.value, origin, plain)

    def origin(self, node: yaml.Node) -> str:
        return _origin(self.name, node.start_mark.line + 1)

    def _check_size(self, node: yaml.Node, ancestors: tuple[yaml.Node, ...]) -> None:
        # Ten aliases of ten aliases of ... : a few lines can stand for billions of values.
        self.count += 1
        remedy = "check that this is a job file; look for repeated aliases"
        if self.count > MAX_NODES:
            cause = f"more than {MAX_NODES} values"
            raise ConfigError(cause, place=self.name, remedy=remedy)
        if len(ancestors) > MAX_DEPTH:
            cause = f"nested more than {MAX_DEPTH} levels deep"
            raise ConfigError(cause, place=self.origin(node), remedy=remedy)

    def _check_tag(self, node: yaml.Node) -> None:
        if node.tag != _TAGS[type(node)]:
            tag = node.tag.replace(_PREFIX, "!!")
            cause = f"the YAML tag '{tag}' is not allowed: a job is plain data"
            self._report(node, cause, "remove the tag")

    def _mapping(self, node: yaml.MappingNode, ancestors: tuple[yaml.Node, ...]) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._report(key_node, "a key must be a single word", "write `key: value`")
                continue
            self._check_tag(key_node)
            key = str(key_node.value)
            # YAML parsers keep the last of two equal keys without a word; here it is an error.
            if key in entries:
                cause = f"the key '{key}' is written twice (first at {entries[key].origin})"
                self._report(key_node, cause, "keep one of them")
                continue
            entries[key] = self.read(value_node, self.origin(key_node), ancestors)
        return entries

    def _report(self, node: yaml.Node, cause: str, remedy: str) -> None:
        self.problems.append(Problem(self.origin(node), cause, remedy))


def parse(text: str, name: str) -> Node | None:
    """Read one YAML document; None if it is empty. ``name``: the file's name in messages.

    Raises:
        ConfigError: with file:line, for anything but plain YAML and for duplicate keys.
    """
    try:
        document = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise _syntax_error(error, text, name) from None
    if document is None:
        return None
    reader = _Reader(name)
    node = reader.read(document, reader.origin(document))
    raise_problems(reader.problems)
    return node


def _origin(name: str, line: int) -> str:
    return name if name == FROM_COMMAND_LINE else f"{name}:{line}"


def _syntax_error(error: yaml.YAMLError, text: str, name: str) -> ConfigError:
    """PyYAML's error with a remedy for the usual mistakes."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        number = mark.line + 1
    else:  # an error of the reader (invalid characters) has a position only
        number = text.count("\n", 0, getattr(error, "position", 0)) + 1
    lines = text.splitlines()
    problem = str(getattr(error, "problem", None) or error).splitlines()[0]
    # A tab misleads the parser, which often complains about a later line: look at all lines before.
    tabbed = [
        count for count, line in enumerate(lines[:number], 1) if re.match(r" *\t\s*[^\s#]", line)
    ]
    if tabbed or "tab character" in problem:
        place = _origin(name, tabbed[-1] if tabbed else number)
        remedy = "indent with spaces: YAML does not accept tabs"
        return ConfigError("indented with a tab", place=place, remedy=remedy)
    line = lines[number - 1] if number <= len(lines) else ""
    if name == FROM_COMMAND_LINE:
        remedy = "put the value in double quotes inside single ones: --set 'KEY=\"VALUE\"'"
    elif "${" in line:
        remedy = 'put the value in quotes ("${NAME}"), or on a line of its own'
    else:
        remedy = "check the colons, quotes and brackets of this line and of the line above"
    cause = f"not readable as YAML: {problem}"
    return ConfigError(cause, place=_origin(name, number), remedy=remedy)


def read_mapping(path: Path) -> Node:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: missing, empty, not UTF-8, not YAML or not a mapping; with file and, if
            possible, line.
    """
    name = display_path(path)
    node = parse(_read_text(path, name), name)
    if node is None:
        remedy = "a job has a model, data and stages: see jobs/quickstart.yaml"
        raise ConfigError("is empty", place=name, remedy=remedy)
    if not isinstance(node.value, dict):
        kind = "a list" if isinstance(node.value, list) else "a single value"
        cause = f"holds {kind}, not a mapping"
        raise ConfigError(cause, place=node.origin, remedy="write `key: value` lines")
    return node


def _read_text(path: Path, name: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        folder = path.parent
        siblings = [sibling.name for sibling in folder.glob("*.yaml")] if folder.is_dir() else []
        remedy = did_you_mean(path.name, siblings, f"YAML files in {display_path(folder)}")
        raise ConfigError(f"cannot be read: {error.strerror}", place=name, remedy=remedy) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _origin(name, content.count(b"\n", 0, error.start) + 1)
        cause = f"byte 0x{content[error.start]:02x} is not UTF-8 text"
        raise ConfigError(cause, place=place, remedy="save the file as UTF-8") from None
