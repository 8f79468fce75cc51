"""The JSON Schema of a job *file*, for completion and checks in editors.

A job file may write more than the resolved job that ``describe.job_schema`` describes: references
to files by name, a single dataset without a name, and 'auto' for values chosen from the images.
"""

from __future__ import annotations

import copy

from pipeline.config.auto_values import AUTO, KEYS
from pipeline.config.schema_text import describe
from pipeline.config.schema_text.describe import JsonSchema
from pipeline.config.yaml_tree.references import Fragments
from pipeline.shipped import CONFIGS


def json_schema() -> JsonSchema:
    """JSON Schema (draft 2020-12) of a job file as a user writes it."""
    schema = copy.deepcopy(describe.job_schema())
    definitions = schema["$defs"]
    # 1. A section may start from a file: `model: {base: revcol_huge, drop_path: 0.4}`.
    _allow_base(definitions["ModelConfig"], "model")
    _allow_base(definitions["ClusterConfig"], "cluster")
    _allow_base(definitions["DatasetConfig"], "data")
    # 2. A stage need not have any key, because its recipe may provide them all.
    training = definitions["TrainConfig"]
    training.pop("required", None)
    training["properties"]["recipe"]["examples"] = _names("recipe")
    # 3. Values chosen from the images.
    for key in KEYS:
        # A dotted key lies in the section `augment`: augment.mixup.
        section = definitions["AugmentConfig"] if key.startswith("augment.") else training
        name = key.removeprefix("augment.")
        section["properties"][name] = _or_auto(section["properties"][name])
    model = definitions["ModelConfig"]["properties"]
    model["stem_stride"] = _or_auto(model["stem_stride"])
    dataset = definitions["DatasetConfig"]["properties"]
    dataset["validation_fraction"] = _or_auto(dataset["validation_fraction"])
    # 4. A number instead of a mapping: `keep_checkpoints: 3`.
    keep = training["properties"]["keep_checkpoints"]
    training["properties"]["keep_checkpoints"] = _or_number(keep)
    # 5. A name instead of a mapping: `model: revcol_huge`; one dataset without a name.
    #    A job that evaluates a trained model takes the network from it.
    schema["required"].remove("model")
    properties = schema["properties"]
    properties["model"] = _or_name(properties["model"], "model")
    properties["cluster"] = _or_name(properties["cluster"], "cluster")
    properties["data"] = _data(properties["data"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A pipeline job",
        **schema,
    }


def _data(named: JsonSchema) -> JsonSchema:
    """Datasets by name, one dataset without a name, or the name of a file."""
    dataset = {"$ref": "#/$defs/DatasetConfig"}
    named["patternProperties"] = {
        pattern: _or_name(dict(dataset), "data") for pattern in named["patternProperties"]
    }
    named["additionalProperties"] = False
    description = named.pop("description", "")
    return {"anyOf": [_name("data"), dataset, named], "description": description}


def _names(kind: str) -> list[str]:
    return Fragments(CONFIGS).names(kind)


def _name(kind: str) -> JsonSchema:
    return {
        "type": "string",
        "description": f"Name of a file in configs/{kind}.",
        "examples": _names(kind),
    }


def _or_name(schema: JsonSchema, kind: str) -> JsonSchema:
    description = schema.pop("description", "")
    return {"anyOf": [_name(kind), schema], "description": description}


def _or_auto(schema: JsonSchema) -> JsonSchema:
    # Editors show the description of the outer schema, so the annotations move there.
    annotations: JsonSchema = {
        key: schema.pop(key) for key in ("description", "default", "title") if key in schema
    }
    return {"anyOf": [schema, {"const": AUTO}], **annotations}


def _or_number(schema: JsonSchema) -> JsonSchema:
    description = schema.pop("description", "")
    number = {"type": "integer", "minimum": 1}
    return {"anyOf": [number, schema], "description": description}


def _allow_base(definition: JsonSchema, kind: str) -> None:
    """Allow ``base`` in a section; with it, the required keys may come from the base."""
    definition["properties"]["base"] = {
        **_name(kind),
        "description": f"Name of a file in configs/{kind} that this section starts from.",
    }
    required = definition.pop("required", [])
    if required:
        definition["anyOf"] = [{"required": ["base"]}, {"required": required}]
