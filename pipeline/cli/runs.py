"""The command runs."""

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
