"""Answers questions about the schema in words: the keys of a section, the values a key accepts.

Error messages, ``explain`` and ``--set`` read the JSON Schema that pydantic derives from the
classes, so that they can never disagree with the validation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pipeline.config.schema import Job
from pipeline.config.schema.renamed import RENAMED_KEYS
from pipeline.config.schema_text.auto_text import HOW_CHOSEN
from pipeline.suggest import closest

JsonSchema: TypeAlias = dict[str, Any]

ANY = "<name>"  # stands for a dataset's name in the path of a key
UNITS = ("pixels", "images", "epochs", "steps", "share", "percent", "channels", "MiB")


@functools.cache
def job_schema() -> JsonSchema:
    """The JSON Schema of a resolved job, as pydantic derives it."""
    return Job.model_json_schema(by_alias=True)


@dataclass(frozen=True)
class SchemaKey:
    """One key of the schema."""

    path: tuple[str, ...]
    schema: JsonSchema
    required: bool = False

    @property
    def section(self) -> JsonSchema:
        """The JSON Schema of the mapping that this key holds; {} if it holds none."""
        # An optional section is written {"anyOf": [{"$ref": section}, {"type": "null"}]}.
        for part in (self.schema, *self.schema.get("anyOf", [])):
            schema = _resolve(part)
            if "properties" in schema or _schema_of_named_values(schema) is not None:
                return schema
        return {}

    @property
    def keys(self) -> list[str]:
        """Keys below this one; [] if it holds no mapping, or one with names as keys."""
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
        """The values that the key accepts, in words."""
        return expectation_of(self.schema) + (" or 'auto'" if self.how_chosen else "")

    @property
    def how_chosen(self) -> str:
        """How the value is chosen that a job file leaves to 'auto'; '' where that is no value.

        Keys that are 'auto' in the schema too say it in their description.
        """
        # stages.evaluate has an image_size as well, which is never chosen.
        in_training = self.path[:1] == ("stages",) and self.path[1:2] != ("evaluate",)
        chosen = in_training or self.path[:1] in {("data",), ("model",)}
        return HOW_CHOSEN.get(self.path[-1], "") if chosen else ""

    def child(self, key: str) -> SchemaKey | None:
        """The key below this one, or None if there is no such key."""
        section = self.section
        path = (*self.path, key)
        if key in section.get("properties", {}):
            return SchemaKey(path, section["properties"][key], key in section.get("required", []))
        named = _schema_of_named_values(section)
        return SchemaKey(path, named) if named is not None else None

    def new_name(self, key: str) -> str | None:
        """The present name of a key below this one, if ``key`` is its name of an old release."""
        new = RENAMED_KEYS.get(key)
        return new if new in self.keys and key not in self.keys else None


def _resolve(schema: JsonSchema) -> JsonSchema:
    """Follow a reference: {"$ref": "#/$defs/TrainConfig"} -> the definition of TrainConfig."""
    if "$ref" in schema:
        definition: JsonSchema = job_schema()["$defs"][schema["$ref"].rsplit("/", 1)[1]]
        return definition
    return schema


def _schema_of_named_values(section: JsonSchema) -> JsonSchema | None:
    """Schema of the values of a mapping whose keys are names (datasets); None for any other."""
    named = [*section.get("patternProperties", {}).values(), section.get("additionalProperties")]
    return next((schema for schema in named if isinstance(schema, dict)), None)


def root() -> SchemaKey:
    """The job itself."""
    return SchemaKey((), job_schema())


def find(path: Sequence[str]) -> SchemaKey | None:
    """The key at a path such as ("stages", "pretrain", "base_lr"), or None if there is none."""
    # Names of datasets are no keys of the schema: child() accepts any name there.
    key: SchemaKey | None = root()
    for part in path:
        key = key.child(part) if key is not None else None
    return key


def all_keys(start: SchemaKey | None = None) -> Iterator[SchemaKey]:
    """Every key, sections before their content; a dataset's name appears as ``<name>``."""
    start = start or root()
    names = start.keys or ([ANY] if start.section else [])
    for name in names:
        child = start.child(name)
        if child is not None:
            yield child
            yield from all_keys(child)


def is_dataset_key(word: str) -> bool:
    """True if a word is a key of a dataset, possibly mistyped or renamed. No dataset is called so.

    It distinguishes ``data: {root: /images}``, a dataset without a name, from ``data: {toy: ...}``.
    """
    dataset = find(("data", ANY))
    if dataset is None:
        return False
    # A high likeness: only obvious typos ("rot", "layuot") count; other words name datasets.
    mistyped = closest(word, [*dataset.keys, "base"], likeness=0.8)
    return bool(mistyped) or dataset.new_name(word) is not None


def expectation_of(schema: JsonSchema) -> str:
    """The JSON Schema of one value in words: "a whole number above 0 or 'auto'"."""
    schema = _resolve(schema)
    # A union of pydantic: PositiveInt | Literal["auto"]. dict.fromkeys drops equal phrases.
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(expectation_of(part) for part in schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        choices = [repr(choice) for choice in schema.get("enum", [schema.get("const")])]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _range(schema)
    if kind == "array":
        items = schema.get("prefixItems")
        if items:
            return f"a list of {len(items)} values, each {expectation_of(items[0])}"
        return f"a list of values, each {expectation_of(schema.get('items', {}))}"
    if kind == "object":
        keys = list(schema.get("properties", {}))
        return f"a mapping with the keys {', '.join(keys)}" if 0 < len(keys) < 10 else "a mapping"
    if kind == "string" and "maxLength" in schema:
        return f"text of {schema.get('minLength', 0)} to {schema['maxLength']} characters"
    return {"boolean": "true or false", "null": "null"}.get(str(kind), "text")


def _range(schema: JsonSchema) -> str:
    """The limits of a number: " from 0 to 3", " above 0", ", 0 or more and below 1" or ""."""
    # Pydantic writes PositiveInt as exclusiveMinimum 0, NonNegativeInt as minimum 0.
    bounds = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
    low, above, high, below = (
        f"{schema[bound]:.10g}" if bound in schema else "" for bound in bounds
    )
    if low and high:
        return f" from {low} to {high}"
    first = f"{low} or more" if low else f"above {above}" if above else ""
    last = f"at most {high}" if high else f"below {below}" if below else ""
    parts = " and ".join(part for part in (first, last) if part)
    return f"{',' if low else ''} {parts}" if parts else ""
