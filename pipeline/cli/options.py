"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.layout import RUNS, RunDir

if TYPE_CHECKING:
    from pipeline.config.load import LoadedJob

JobFile = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="A job file, or the name of a shipped job.", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Set a key of the job; repeatable.", show_default=False
    ),
]
RunDirectory = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        help="The run directory; default: runs/<name of the job>.",
        show_default=False,
    ),
]
Cluster = Annotated[
    str,
    typer.Option(
        "--on",
        metavar="NAME",
        help="Run on this cluster: a file in configs/cluster (ray, slurm, kubernetes), or a "
        "file of your own.",
        show_default=False,
    ),
]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="Name or directory of a run.", show_default=False)
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the metrics to this file.", show_default=False),
]


def load(
    job: str,
    overrides: list[str] | None,
    *,
    rehearse: bool = False,
    on: str = "",
    submits: bool = False,
) -> LoadedJob:
    """Load the job that an argument names; see ``load_job`` for the others."""
    from pipeline.config.load import load_job
    from pipeline.orchestrate.job_files import find_job_file

    return load_job(find_job_file(job), overrides or [], rehearse=rehearse, on=on, submits=submits)


def run_directory(given: Path | None, loaded: LoadedJob) -> RunDir:
    """The run directory of ``--run-dir``, or the default one of the job."""
    # Absolute: Ray's workers have another current folder.
    return RunDir((given or RUNS / loaded.job.name).absolute())
