"""Commands about runs: runs, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import RUNS


def runs(
    folder: Annotated[
        Path, typer.Option("--runs-dir", metavar="DIR", help="Folder of the run directories.")
    ] = RUNS,
) -> None:
    """List the runs: state, stage, last metric, age."""
    from pipeline.orchestrate import run_list

    run_list.print_runs(folder)


def verify(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_DATASET",
            help="A run (name or directory), or a prepared dataset.",
            show_default=False,
        ),
    ],
) -> None:
    """Compare the files of a run with their digests.

    Run state, weights, checkpoints, export and prepared data; every prepared image is decoded.
    """
    from pipeline.orchestrate import verify_data

    verify_data.verify(target, RUNS)
