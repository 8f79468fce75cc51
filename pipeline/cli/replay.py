"""The command replay."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import RunName
from pipeline.layout import RUNS


def replay(
    run: RunName,
    step: Annotated[
        int, typer.Option("--step", min=1, help="The step, as logs count.", show_default=False)
    ],
    stage: Annotated[
        str,
        typer.Option("--stage", help="The training stage; by default the last one that began."),
    ] = "",
) -> None:
    """Compute one step of a run again: is it the data, the weights or the arithmetic?

    Starts from the state kept before a bad step, or from the checkpoint before the step.
    """
    from pipeline.orchestrate.replay_step import replay_step

    replay_step(run, RUNS, step, stage)
