"""Commands about the keys of a job: schema, explain."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipeline.cli.options import Overrides, load


def schema() -> None:
    """Print the JSON Schema of job files, for an editor."""
    from pipeline.config.schema_text.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2))


def explain(
    key: Annotated[
        str,
        typer.Argument(
            help="A key such as stages.pretrain.base_lr, or its last part: base_lr.",
            show_default=False,
        ),
    ],
    job: Annotated[
        str | None,
        typer.Option(
            "--job",
            help="A job file or shipped job: also print its value and where it is set.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Explain a key of a job: meaning, unit, default, value."""
    from pipeline.config import render

    print(render.explain(key, load(job, overrides) if job is not None else None))
