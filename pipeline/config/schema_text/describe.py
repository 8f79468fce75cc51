"""What a job may say, asked of the schema: the keys of a section, what a key expects, the key that was meant."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import Job
from pipeline.suggest import closest

ANY = "<name>"  # stands for a dataset's name in the path of a key
UNITS = ("pixels", "images", "epochs", "steps", "share", "percent")


@functools.cache
def raw_schema() -> dict[str, Any]:
    """The JSON Schema of a resolved job, as pydantic makes it."""
    return Job.model_json_schema(by_alias=True)


@dataclass(frozen=True)
class Field:
    """One key of the schema."""

    path: tuple[str, ...]
    schema: dict[str, Any]
    required: bool = False

    @property
    def section(self) -> dict[str, Any]:
        """The JSON Schema of the mapping that this key holds; {} if it holds none."""
        for part in (self.schema, *self.schema.get("anyOf", [])):
            found = _resolve(part)
            if "properties" in found or _any_key(found) is not None:
                return found
        return {}

    @property
    def keys(self) -> list[str]:
        return list(self.section.get("properties", {}))

    @property
    def dotted(self) -> str:
        return ".".join(self.path)

    @property
    def description(self) -> str:
        return str(self.schema.get("description", "") or self.section.get("description", ""))

    @property
    def unit(self) -> str:
        """The unit that the description names in parentheses, or ''."""
        return next((unit for unit in UNITS if f"({unit}" in self.description), "")

    @property
    def expectation(self) -> str:
        """What may be written here, in words."""
        return words(self.schema)

    def child(self, key: str) -> Field | None:
        """The key below this one, or None if there is no such key."""
        section = self.section
        if key in section.get("properties", {}):
            return Field(
                (*self.path, key), section["properties"][key], key in section.get("required", [])
            )
        extra = _any_key(section)
        return Field((*self.path, key), extra) if extra is not None else None


def _resolve(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        found: dict[str, Any] = raw_schema()["$defs"][schema["$ref"].rsplit("/", 1)[1]]
        return found
    return schema


def _any_key(section: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of the values of a mapping whose keys are names; None for any other."""
    named = [*section.get("patternProperties", {}).values(), section.get("additionalProperties")]
    return next((schema for schema in named if isinstance(schema, dict)), None)


def root() -> Field:
    """The job itself."""
    return Field((), raw_schema())


def field(path: Sequence[str]) -> Field | None:
    """The key at a path such as ("stages", "pretrain", "lr"), or None if there is no such key."""
    found: Field | None = root()
    for key in path:
        found = found.child(key) if found is not None else None
    return found


def all_fields(start: Field | None = None) -> Iterator[Field]:
    """Every key there is, sections before what they hold; a dataset's name appears as ``<name>``."""
    start = start or root()
    keys = start.keys or ([ANY] if start.section else [])
    for key in keys:
        child = start.child(key)
        if child is not None:
            yield child
            yield from all_fields(child)


def is_dataset_key(key: str) -> bool:
    """Whether a word is, or was meant to be, a key of a dataset: no dataset can have such a name."""
    dataset = field(("data", ANY))
    return dataset is not None and bool(closest(key, [*dataset.keys, "base"], likeness=0.8))


def words(schema: dict[str, Any]) -> str:
    """A JSON Schema of one value, in words: 'a whole number above 0 or 'auto''."""
    schema = _resolve(schema)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(words(one) for one in schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        choices = [repr(one) for one in schema.get("enum", [schema.get("const")])]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _range(schema)
    if kind == "array":
        items = schema.get("prefixItems")
        if items:
            return f"a list of {len(items)} values, each {words(items[0])}"
        return f"a list of values, each {words(schema.get('items', {}))}"
    if kind == "object":
        keys = list(schema.get("properties", {}))
        return f"a mapping with the keys {', '.join(keys)}" if 0 < len(keys) < 10 else "a mapping"
    if kind == "string" and "maxLength" in schema:
        return f"text of {schema.get('minLength', 0)} to {schema['maxLength']} characters"
    return {"boolean": "true or false", "null": "null"}.get(str(kind), "text")


def _range(schema: dict[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    low, above, high, below = (
        f"{one:.10g}" if one is not None else "" for one in (low, above, high, below)
    )
    if low and high:
        return f" from {low} to {high}"
    first = f"{low} or more" if low else f"above {above}" if above else ""
    last = f"at most {high}" if high else f"below {below}" if below else ""
    parts = " and ".join(part for part in (first, last) if part)
    return f"{',' if low else ''} {parts}" if parts else ""
