"""The command doctor."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pipeline.cli.options import Cluster, Overrides, RunDirectory, load, run_directory

_ANY_JOB = "quickstart"  # has no data of its own


def doctor(
    job: Annotated[
        str,
        typer.Argument(
            metavar="[JOB]",
            help="A job file or shipped job: also check that its data is there.",
            show_default=False,
        ),
    ] = "",
    overrides: Overrides = None,
    on: Cluster = "",
    run_dir: RunDirectory = None,
) -> None:
    """Check the machines of a cluster: are they fit for a job.

    The same checks run before the first stage of every job on a cluster: shared folders, data,
    space, versions, code, clocks, limits, devices and network. Without --on: of this machine.
    """
    from pipeline.orchestrate import doctor as checks
    from pipeline.orchestrate.joined_ray import ADDRESS

    is_driver = bool(os.environ.get(ADDRESS))
    # Without a job, one stands in that trains nothing: it suits every number of processes.
    stand_in = [] if job else ["name=doctor", "stages={prepare: {}}"]
    loaded = load(job or _ANY_JOB, [*stand_in, *(overrides or [])], on=on, submits=not is_driver)
    directory = run_directory(run_dir, loaded)
    if is_driver or loaded.job.cluster.kind == "local":
        checks.check_here(loaded, directory)
    elif code := checks.check_on_cluster(loaded, directory):
        raise typer.Exit(code)
