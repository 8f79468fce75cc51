"""The command chaos: does a job survive faults without a change of its result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import JobFile, Overrides, load
from pipeline.layout import RUNS


def chaos(
    job: JobFile,
    faults: Annotated[int, typer.Option(min=1, help="How many faults.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the random choices.")] = 0,
    overrides: Overrides = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", help="Of both runs (default: runs/NAME-chaos-SEED).", show_default=False
        ),
    ] = None,
) -> None:
    """Run a job twice, once disturbed by random faults, and compare the results bit for bit.

    Kills and stops processes of that run, corrupts its checkpoints and fills a disk of its own.
    """
    from pipeline.chaos.campaign import Campaign
    from pipeline.chaos.report import table
    from pipeline.config.job_queries import training_stages
    from pipeline.monitor.console import output_console
    from pipeline.orchestrate.job_files import find_job_file
    from pipeline.orchestrate.signals import StopRequest

    loaded = load(job, overrides)
    name = f"{loaded.job.name}-chaos-{seed}"
    console = output_console()
    campaign = Campaign(
        arguments=[
            str(find_job_file(job)),
            *(word for override in overrides or () for word in ("--set", override)),
        ],
        stages=training_stages(loaded.job),
        folder=(folder or RUNS / name).absolute(),
        faults=faults,
        seed=seed,
        log=lambda text, level="info": console.print(text, markup=False),
    )
    campaign.folder.mkdir(parents=True, exist_ok=True)
    stop = StopRequest(campaign.log)
    stop.install()
    try:
        with stop.at_once():
            campaign.run()
    finally:
        console.print(table(campaign.events))
    console.print(f"{len(campaign.events)} faults, all results equal")
