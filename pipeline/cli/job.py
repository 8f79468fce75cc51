"""Commands that run a job: run, train."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pipeline.cli.options import Cluster, JobFile, Overrides, RunDirectory, load, run_directory
from pipeline.orchestrate.job_files import description, shipped_jobs

# Shown below the options by `run --help`.
SHIPPED_JOBS = f"Shipped jobs: {', '.join(shipped_jobs())}. Their descriptions: run --list."


def _list_jobs(requested: bool) -> None:
    # An eager callback runs before the missing argument JOB is reported.
    if requested:
        for name, path in shipped_jobs().items():
            print(f"{name:<20}  {description(path)}")
        raise typer.Exit


Rehearse = Annotated[
    bool, typer.Option("--rehearse", help="Run every stage of the job, shrunk to minutes.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the resolved job and what would run; run nothing."),
]
ListJobs = Annotated[
    bool, typer.Option("--list", help="List the shipped jobs.", is_eager=True, callback=_list_jobs)
]
Render = Annotated[
    bool, typer.Option("--render", help="Print what would be submitted; send nothing.")
]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Submit, and do not follow the run.")]


def run(
    job: JobFile,
    overrides: Overrides = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            "--stage",
            metavar="STAGE",
            help="Run only this stage; repeatable.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Restart from scratch: the stages named with --stage, or the whole job. "
            "Earlier results are moved aside.",
        ),
    ] = False,
    rehearse: Rehearse = False,
    dry_run: DryRun = False,
    run_dir: RunDirectory = None,
    on: Cluster = "",
    render: Render = False,
    detach: Detach = False,
    list_jobs: ListJobs = False,
) -> None:
    """Run the stages of a job that are not up to date. Resumes an interrupted run.

    The word run may be left out before a file: JOB.yaml [options]. With --on, the job is submitted
    to a cluster and followed; Ctrl-C leaves it running.
    """
    from pipeline.orchestrate import run_job, submit
    from pipeline.orchestrate.joined_ray import ADDRESS
    from pipeline.runtime import environment

    is_driver = bool(os.environ.get(ADDRESS))
    loaded = load(job, overrides, rehearse=rehearse, on=on, submits=not is_driver)
    directory = run_directory(run_dir, loaded)
    if dry_run:
        print(run_job.dry_run(loaded, directory), end="")
        return
    if is_driver or loaded.job.cluster.kind == "local":
        if render or detach:
            raise typer.BadParameter(
                "only a run on a cluster has this option", param_hint="--render, --detach"
            )
        # A scheduler that starts the driver again must not start the work from scratch again.
        force = force and not environment.restarts()
        run_job.run_job(loaded, directory, stage or [], force=force)
        return
    options = submit.SubmitOptions(stages=stage or [], force=force, detach=detach)
    if render:
        print(submit.render_submission(loaded, directory, options), end="")
    elif code := submit.submit_run(loaded, directory, options):
        raise typer.Exit(code)


def train(
    job: JobFile,
    stage: Annotated[str, typer.Option("--stage", help="pretrain or finetune.")],
    overrides: Overrides = None,
    run_dir: RunDirectory = None,
) -> None:
    """Train one stage in this process, without Ray. Also works under torchrun.

    The data must be prepared.
    """
    from pipeline.orchestrate.run_job import train_in_this_process

    loaded = load(job, overrides)
    train_in_this_process(loaded, stage, run_directory(run_dir, loaded))
