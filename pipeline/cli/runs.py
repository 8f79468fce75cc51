"""Commands about runs: runs, logs, stop, fetch, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import RunName
from pipeline.layout import RUNS


def runs(
    folder: Annotated[
        Path, typer.Option("--runs-dir", metavar="DIR", help="Folder of the run directories.")
    ] = RUNS,
) -> None:
    """List the runs: where, state, stage, last metric, time left, GPU-hours, age."""
    from pipeline.orchestrate import run_list

    run_list.print_runs(folder)


def logs(
    run: RunName,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print what is added, until the run ends.")
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(min=0, help="What this process has written instead.", show_default=False),
    ] = None,
) -> None:
    """Print the messages of a run, on this machine or on a cluster."""
    from pipeline.orchestrate import run_control

    run_control.show_output(run_control.find(run, RUNS), rank=rank, keeps_following=follow)


def stop(
    run: RunName,
    now: Annotated[bool, typer.Option("--now", help="End at once, without a checkpoint.")] = False,
) -> None:
    """Stop a run after a checkpoint. The command that started it resumes it."""
    from pipeline.orchestrate import run_control

    run_control.stop(run_control.find(run, RUNS), now=now, log=print)


def fetch(
    run: RunName,
    part: Annotated[
        str, typer.Argument(metavar="PART", help="export, logs or tensorboard.")
    ] = "export",
) -> None:
    """Bring results of a run here whose directory only a cluster sees."""
    from pipeline.orchestrate import run_control

    print(run_control.fetch(run_control.find(run, RUNS), part))


def send(
    run: RunName,
    part: Annotated[str, typer.Argument(metavar="PART", help="As for fetch.")],
) -> None:
    """Print a part of a run as text: what fetch calls on a cluster."""
    import sys

    from pipeline.orchestrate import run_control, sent_files

    sent_files.pack(run_control.part_of(run_control.find(run, RUNS), part), sys.stdout.write)


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
