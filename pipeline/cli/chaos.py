"""The command chaos: does a job survive faults without a change of its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from pipeline.cli.options import Cluster, JobFile, Overrides, load
from pipeline.errors import ConfigError
from pipeline.layout import RUNS, RunDir

if TYPE_CHECKING:
    from pipeline.chaos.cluster_driver import OnCluster
    from pipeline.config.load import LoadedJob


def chaos(
    job: JobFile,
    faults: Annotated[int, typer.Option(min=1, help="How many faults.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the random choices.")] = 0,
    overrides: Overrides = None,
    on: Cluster = "",
    reach: Annotated[
        str,
        typer.Option(
            "--reach",
            metavar="COMMAND",
            help="On a cluster: what runs a command as root on a machine, such as 'ssh {host}'. "
            "Processes that it leaves in the background must live on.",
            show_default=False,
        ),
    ] = "",
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", help="Of both runs (default: runs/NAME-chaos-SEED).", show_default=False
        ),
    ] = None,
) -> None:
    """Run a job twice, once disturbed by random faults, and compare the results bit for bit.

    Kills and stops processes of that run, corrupts its checkpoints and fills a disk of its own.
    On a cluster whose run directories this machine sees (--on), it cuts links between the run's
    machines, for a minute each, instead of filling a disk.
    """
    from pipeline.chaos.campaign import Campaign
    from pipeline.chaos.report import table
    from pipeline.config.job_queries import training_stages
    from pipeline.monitor.console import output_console
    from pipeline.orchestrate.job_files import find_job_file
    from pipeline.orchestrate.signals import StopRequest

    loaded = load(job, overrides, on=on, submits=True)
    console = output_console()
    place = (folder or RUNS / f"{loaded.job.name}-chaos-{seed}").absolute()
    campaign = Campaign(
        arguments=[
            str(find_job_file(job)),
            *(word for override in overrides or () for word in ("--set", override)),
        ],
        stages=training_stages(loaded.job),
        folder=place,
        faults=faults,
        seed=seed,
        log=lambda text, level="info": console.print(text, markup=False),
        cluster=_cluster(loaded, on, reach, place),
    )
    campaign.folder.mkdir(parents=True, exist_ok=True)
    stop = StopRequest(campaign.log)
    stop.install()
    try:
        with stop.at_once():
            campaign.run()
    finally:
        console.print(table(campaign.events))
    console.print(f"all results are equal; faults: {len(campaign.events)}")


def _cluster(loaded: LoadedJob, on: str, reach: str, folder: Path) -> OnCluster | None:
    """The cluster of ``--on``.

    Raises:
        ConfigError: its machines or its run directories are out of reach.
    """
    from pipeline.chaos.cluster_driver import OnCluster
    from pipeline.orchestrate.submit import cluster_directory

    cluster = loaded.job.cluster
    if cluster.kind == "local":
        if reach:
            raise typer.BadParameter("only on a cluster (--on)", param_hint="--reach")
        return None
    if "{host}" not in reach:
        raise ConfigError(
            "chaos on a cluster runs commands on its machines",
            place="--reach",
            remedy="say how: --reach 'ssh {host}'",
        )
    runs = cluster_directory(loaded, RunDir(folder)).path.parent
    if cluster.kind == "kubernetes" or (cluster.runs_folder and not runs.is_dir()):
        raise ConfigError(
            "chaos looks into the run directories, which this machine does not see",
            place=str(runs),
            remedy="call it where the file system of the runs is mounted (kind slurm or ray)",
        )
    return OnCluster(
        name=on,
        runs=runs,
        nodes=cluster.nodes,
        reach=reach,
        head=urlsplit(cluster.ray.address).hostname or "",
    )
