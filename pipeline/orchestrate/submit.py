"""Submits a job to a cluster: the work behind ``run`` with ``--on``.

Two jobs never work on one run: a run that is under way is followed instead of submitted, and the
lock of the run keeps out a driver that was started in any other way.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.code_package import code_digest
from pipeline.cluster.launcher import Submission
from pipeline.cluster.launchers import launcher_for
from pipeline.cluster.record import ClusterRecord, read_record, versions, write_record
from pipeline.cluster.shared_paths import why_not_shared
from pipeline.command import command
from pipeline.config import job_queries, render
from pipeline.config.check_on_machine import check_on_machine
from pipeline.config.load import ON_CLUSTER, LoadedJob
from pipeline.errors import ConfigError, DataError
from pipeline.layout import RunDir, has_state
from pipeline.monitor.console import Display, output_console
from pipeline.orchestrate.cluster_run import (
    ClusterRun,
    cluster_run,
    how_to_return,
    shown_run,
)
from pipeline.orchestrate.follow import follow
from pipeline.orchestrate.job_runner import JobRunner
from pipeline.orchestrate.judgement import Judge
from pipeline.orchestrate.run_lock import in_use, is_locked, make_folder, read_owner
from pipeline.orchestrate.run_state import RunState
from pipeline.orchestrate.signals import StopRequest
from pipeline.orchestrate.summary import summarise


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """Options of ``run``. ``detach``: do not follow the run."""

    stages: Sequence[str] = ()
    force: bool = False
    detach: bool = False


def cluster_directory(loaded: LoadedJob, run_dir: RunDir) -> RunDir:
    """The run directory as the cluster sees it.

    Example: runs: /shared/runs in the cluster file, here runs/a -> /shared/runs/a.
    """
    runs = loaded.job.cluster.runs_folder
    return RunDir(Path(runs) / run_dir.path.name) if runs else run_dir


def render_submission(loaded: LoadedJob, run_dir: RunDir, options: SubmitOptions) -> str:
    """What would be submitted, as text. Sends nothing.

    Raises:
        ConfigError: the job cannot work.
    """
    submission = submission_of(checked(loaded, run_dir), run_dir, options, attempt=1)
    return launcher_for(loaded.job.cluster).render(submission)


def submit_run(loaded: LoadedJob, run_dir: RunDir, options: SubmitOptions) -> int:
    """Submit a job, or find it under way; then follow it. Returns the exit code of the run.

    Raises:
        ConfigError: the job cannot work, the cluster refuses it, or a process of this machine is
            working on the run.
        Detached: the run continues without this command.
    """
    console = output_console()
    display = Display(console)
    with _submit_lock(run_dir):
        # 1. Is it under way? Whatever the command line asks for now, one job works on a run.
        run = cluster_run(run_dir)
        under_way = run is not None and run.state().under_way
        if run is not None and under_way:
            display.log(f"already under way: {run.where}; nothing is submitted")
        else:
            # 2. Could it work? Nothing is sent before all checks of this machine have passed.
            loaded = checked(loaded, run_dir)
            for note in loaded.notes:
                display.log(note)
            # 3. Is there anything to do? A queue of hours is no place to learn that there is not.
            if _is_done(loaded, run_dir, options, display):
                return 0
            # 4. Only now the cluster is asked, and gets the job.
            run = _submit(loaded, run_dir, options)
            display.log(f"submitted: {run.where}, attempt {run.record.attempt}")
    if options.detach:
        display.log(how_to_return(run_dir))
        return 0
    code = follow(run, console, from_start=not under_way)
    if run.here is None and code == 0:
        name = shown_run(run_dir)
        display.log(f"the results are on the cluster; to bring them here: {command('fetch', name)}")
    return code


def checked(loaded: LoadedJob, run_dir: RunDir) -> LoadedJob:
    """The job with the checks of one for several machines.

    Raises:
        ConfigError: the job cannot work, or a path is on this machine only.
    """
    directory = cluster_directory(loaded, run_dir)
    loaded = check_on_machine(loaded, directory)
    cluster = loaded.job.cluster
    # A folder that the user names in `runs` is shared, whatever this machine sees at that path.
    if reason := "" if cluster.runs_folder else why_not_shared(directory.path):
        raise ConfigError(
            f"the machines of a cluster cannot see this run directory: {reason}",
            place=str(directory.path),
            remedy="--run-dir DIR on a file system that all machines share, or name the cluster's "
            "folder with --set cluster.runs=DIR",
        )
    if cluster.kind == "kubernetes":
        return loaded  # pods see their claims, whatever lies at these paths on this machine
    for name, dataset in loaded.job.data.items():
        # What is not here may be on the cluster; its machines look for it before the first stage.
        if "://" in dataset.root or not Path(dataset.root or "/-").exists():
            continue
        if reason := why_not_shared(dataset.root, cluster.runs):
            raise ConfigError(
                f"data.{name}.root: the machines of a cluster cannot see {dataset.root}: {reason}",
                place=loaded.origins.get(f"data.{name}.root", ""),
                remedy="move the images to a file system that all machines share, or to a store "
                "(s3://...)",
            )
    return loaded


def _is_done(loaded: LoadedJob, run_dir: RunDir, options: SubmitOptions, display: Display) -> bool:
    """True, with the summary printed, if this machine sees the run and no stage is to run.

    Raises:
        ConfigError: finished work would be lost.
    """
    directory = cluster_directory(loaded, run_dir)
    # With values that the cluster chooses, its driver judges.
    if not has_state(directory) or ON_CLUSTER in loaded.origins.values():
        return False
    run_state = RunState(directory, loaded.job.name)
    stages = list(options.stages) or job_queries.stage_names(loaded.job)
    judge = Judge(
        job=loaded.job,
        resolved=loaded.resolved(),
        run_dir=directory,
        run_state=run_state,
        stages=stages,
        thorough=bool(options.stages),
    )
    try:
        decisions = judge.judge_all(force=options.force)
    except DataError:
        return False  # the source is on the cluster, whose driver judges
    if any(decision.action != "skip" for decision in decisions.values()) or options.force:
        return False
    stop = StopRequest(lambda text: display.log(text, "warning"))
    summarise(
        JobRunner(loaded=loaded, run_dir=directory, run_state=run_state, display=display, stop=stop)
    )
    return True


def _submit(loaded: LoadedJob, run_dir: RunDir, options: SubmitOptions) -> ClusterRun:
    cluster = loaded.job.cluster
    directory = cluster_directory(loaded, run_dir)
    if is_locked(directory):
        raise in_use(directory, read_owner(directory))
    earlier = read_record(run_dir)
    attempt = 1 if earlier is None else earlier.attempt + 1
    submission = submission_of(loaded, run_dir, options, attempt)
    # Before the mark of a stop is removed and the attempt counted: a refusal changes nothing.
    launcher = launcher_for(cluster)
    launcher.check(submission)
    # Slurm appends to the log of earlier jobs. Ray has a log for each.
    log_start = 0
    if earlier is not None and earlier.kind == cluster.kind == "slurm":
        log_start = len(launcher.log(earlier.id, directory.path, 0))
    # An attempt begins: the mark of an earlier stop would end it.
    directory.stop_mark.unlink(missing_ok=True)
    record = ClusterRecord(
        kind=cluster.kind,
        id=launcher.submit(submission),
        address=cluster.ray.address if cluster.kind == "ray" else "",
        directory=str(directory.path),
        attempt=attempt,
        log_start=log_start,
        # Its variables are for the training processes; nobody needs them here.
        cluster=cluster.model_dump(mode="json", exclude={"network"}),
        submitted=time.time(),
        versions=versions(),
        code=code_digest(),
    )
    write_record(run_dir, record)
    return ClusterRun(run_dir=run_dir, record=record)


def submission_of(
    loaded: LoadedJob, run_dir: RunDir, options: SubmitOptions, attempt: int
) -> Submission:
    """What a launcher gets to submit a run. ``attempt``: number of the submission, from 1."""
    directory = cluster_directory(loaded, run_dir)
    stages = [word for stage in options.stages for word in ("--stage", stage)]
    for stage in options.stages:
        job_queries.stage_config(loaded.job, stage)  # raises if the job has no such stage
    force = ["--force"] if options.force else []
    return Submission(
        name=loaded.job.name,
        cluster=loaded.job.cluster,
        run_dir=directory.path,
        job_text=render.portable_job_file(loaded),
        options=("--run-dir", str(directory.path), *stages, *force),
        attempt=attempt,
    )


@contextlib.contextmanager
def _submit_lock(run_dir: RunDir) -> Iterator[None]:
    """Let one command at a time decide about a run: two would both submit it."""
    make_folder(run_dir.path)
    with open(run_dir.submit_lock, "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks; the run has its own
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # A job that is refused leaves no directory behind.
            if [path.name for path in run_dir.path.iterdir()] == [run_dir.submit_lock.name]:
                run_dir.submit_lock.unlink()
                run_dir.path.rmdir()
