"""The JSON Schema of a job *file* for editors: references by name, one dataset without a name, values left to 'auto'."""

from __future__ import annotations

import copy
from typing import Any

from pipeline.config.auto_values import AUTO, KEYS
from pipeline.config.schema_text import describe
from pipeline.config.yaml_tree.references import Fragments
from pipeline.shipped import CONFIGS


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a job file as a user writes it."""
    schema = copy.deepcopy(describe.raw_schema())
    definitions = schema["$defs"]
    for name, kind in (
        ("ModelConfig", "model"),
        ("ClusterConfig", "cluster"),
        ("DatasetConfig", "data"),
    ):
        _allow_base(definitions[name], kind)
    training = definitions["TrainConfig"]
    training.pop("required", None)  # a recipe may have them
    training["properties"]["recipe"]["examples"] = _names("recipe")
    for key in KEYS:
        training["properties"][key] = _or_auto(training["properties"][key])
    fraction = definitions["DatasetConfig"]["properties"]
    fraction["validation_fraction"] = _or_auto(fraction["validation_fraction"])
    properties = schema["properties"]
    properties["model"] = _or_name(properties["model"], "model")
    properties["cluster"] = _or_name(properties["cluster"], "cluster")
    named = properties["data"]
    one = {"$ref": "#/$defs/DatasetConfig"}
    named["patternProperties"] = {
        pattern: _or_name(dict(one), "data") for pattern in named["patternProperties"]
    }
    named["additionalProperties"] = False
    properties["data"] = {
        "anyOf": [_name("data"), one, named],
        "description": named.pop("description", ""),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A pipeline job",
        **schema,
    }


def _names(kind: str) -> list[str]:
    return Fragments(CONFIGS).names(kind)


def _name(kind: str) -> dict[str, Any]:
    return {
        "type": "string",
        "description": f"Name of a file in configs/{kind}.",
        "examples": _names(kind),
    }


def _or_name(schema: dict[str, Any], kind: str) -> dict[str, Any]:
    description = schema.pop("description", "")
    return {"anyOf": [_name(kind), schema], "description": description}


def _or_auto(schema: dict[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {
        key: schema.pop(key) for key in ("description", "default", "title") if key in schema
    }
    return {"anyOf": [schema, {"const": AUTO}], **described}


def _allow_base(definition: dict[str, Any], kind: str) -> None:
    """A mapping with `base` need not have what the base has."""
    definition["properties"]["base"] = {
        **_name(kind),
        "description": f"Name of a file in configs/{kind} that this changes.",
    }
    required = definition.pop("required", [])
    if required:
        definition["anyOf"] = [{"required": ["base"]}, {"required": required}]
