"""Checks whether the machines of a cluster are fit for a job: the work behind the command doctor.

On this machine it submits itself to the cluster. There, as the driver, it joins the cluster's Ray,
and runs the checks that a run makes before its first stage.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from rich.console import Console

from pipeline.cluster.launcher import Submission
from pipeline.cluster.launchers import launcher_for
from pipeline.cluster.record import ClusterRecord
from pipeline.config import machine, render
from pipeline.config.load import LoadedJob
from pipeline.errors import Detached, Interrupted, StageError
from pipeline.layout import RunDir
from pipeline.monitor.console import Display, output_console
from pipeline.orchestrate import preflight
from pipeline.orchestrate.cluster_run import ClusterRun
from pipeline.orchestrate.follow import follow
from pipeline.orchestrate.joined_ray import ADDRESS, joined_ray
from pipeline.orchestrate.machine_pool import MachinePool
from pipeline.orchestrate.machines import Machine, alive_machines
from pipeline.orchestrate.ray_session import ray_session
from pipeline.orchestrate.signals import StopRequest
from pipeline.orchestrate.submit import checked, cluster_directory
from pipeline.reporting import Log


def check_here(loaded: LoadedJob, run_dir: RunDir) -> None:
    """Check the machines of the Ray that this process joins, or this machine alone.

    Raises:
        StageError: a machine is not fit, or is not there.
    """
    display = Display(Console(highlight=False))
    stop = StopRequest(lambda text: display.log(text, "warning"))
    stop.install()
    started = time.monotonic()
    # Run directory and sources are those of the job: the machines must see these, not any folder.
    plan = preflight.plan_of(loaded.job, run_dir)
    with _machines(loaded, stop, display.log) as machines:
        try:
            report = preflight.check_machines(machines, loaded.job.cluster, plan, stop.check)
        finally:
            # The checks create the folders of a run. One that does not exist yet leaves nothing.
            for folder in reversed(plan.folders):
                with contextlib.suppress(OSError):  # not empty: of a run
                    folder.rmdir()
    for line, level in report.lines():
        display.log(line, level)
    seconds = time.monotonic() - started
    display.log(f"{len(machines)} machines checked in {seconds:.1f} s")
    if report.unfit:
        names = ", ".join(unfit.name for unfit in report.unfit)
        raise StageError(
            f"not fit: {names}",
            place=loaded.job.cluster.kind,
            remedy="the lines above name each cause and what to do",
        )


@contextlib.contextmanager
def _machines(loaded: LoadedJob, stop: StopRequest, log: Log) -> Iterator[list[Machine]]:
    """The machines to check, while connected with their Ray."""
    cluster = loaded.job.cluster
    address = os.environ.get(ADDRESS, "")
    if not address:
        gpus = machine.gpus() if machine.device(cluster) == "cuda" else 0
        with ray_session(machine.cores(), gpus, check=stop.check):
            yield alive_machines()
        return
    with joined_ray(address, stop.check) as joined:
        pool = MachinePool(job=loaded.job, head=joined.head, check=stop.check, log=log)
        try:
            pool.wait_for_all()
        except Interrupted as error:
            stop.check()  # raises if it is a stop request
            remedy = "start them, or lower cluster.nodes"
            raise StageError(error.cause, place=error.place, remedy=remedy) from None
        yield pool.usable()


def check_on_cluster(loaded: LoadedJob, run_dir: RunDir) -> int:
    """Have the cluster check its machines; returns the exit code. Ctrl-C ends the check there.

    Raises:
        ConfigError: the job cannot work there, or the cluster refuses it.
    """
    loaded = checked(loaded, run_dir)
    directory = cluster_directory(loaded, run_dir)
    cluster = loaded.job.cluster
    submission = Submission(
        name=f"doctor-{loaded.job.name}",
        cluster=cluster,
        run_dir=directory.path,
        job_text=render.portable_job_file(loaded),
        verb="doctor",
        options=("--run-dir", str(directory.path)),
    )
    launcher = launcher_for(cluster)
    launcher.check(submission)
    job_id = launcher.submit(submission)
    # Not written anywhere: it is no attempt of the run.
    record = ClusterRecord(
        kind=cluster.kind,
        id=job_id,
        directory=str(directory.path),
        cluster=cluster.model_dump(mode="json", exclude={"network"}),
    )
    console = output_console()
    try:
        return follow(ClusterRun(run_dir=run_dir, record=record), console, from_start=True)
    except Detached:
        launcher.stop(job_id, now=True)
        raise Interrupted("the check was ended", place=f"job {job_id}") from None
