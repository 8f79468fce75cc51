"""The JSON Schema for editors accepts what the loader accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipeline.config.load import load_job
from pipeline.config.schema_text.json_schema import json_schema
from pipeline.config.yaml_tree.reading import read_mapping
from tests.config.jobs import ROOT, SHIPPED, each_shipped_job


@each_shipped_job
def test_json_schema_accepts_every_shipped_job(path: Path) -> None:
    schema = json.loads(json.dumps(json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(read_mapping(path).data())


def test_json_schema_accepts_resolved_jobs_and_refuses_mistakes(environment: None) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    for path in SHIPPED:
        validator.validate(load_job(path).resolved())
    good = read_mapping(ROOT / "jobs/quickstart.yaml").data()
    mistakes: list[dict[str, Any]] = [
        {"nmae": "x"},
        {"seed": "x"},
        {"model": {"columns": 3}},
        {"data": {"bad name": {}}},
        {"data": {"x": {"rot": ""}}},
        {"stages": {"pretrain": {"lrr": 1}}},
        {"stages": {"pretrain": {"epochs": "many"}}},
    ]
    for mistake in mistakes:
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(good | mistake)
