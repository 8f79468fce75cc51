"""A run that was submitted to a cluster, as the commands on this machine see it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from pipeline.cluster.launcher import JobState, Launcher
from pipeline.cluster.launchers import launcher_of
from pipeline.cluster.record import ClusterRecord, read_record
from pipeline.command import command
from pipeline.errors import Interrupted, StageError
from pipeline.layout import RUNS, RunDir, has_state
from pipeline.orchestrate.run_state import read_run_state


@dataclass(frozen=True, kw_only=True)
class ClusterRun:
    """A submitted run. ``run_dir``: the directory on this machine that holds ``cluster.json``."""

    run_dir: RunDir
    record: ClusterRecord

    @property
    def here(self) -> RunDir | None:
        """The run directory itself; None while this machine does not see it."""
        return self.record.run_dir if has_state(self.record.run_dir) else None

    @property
    def launcher(self) -> Launcher:
        return launcher_of(self.record)

    @property
    def where(self) -> str:
        """For messages: "job 4711 (slurm)"."""
        return f"job {self.record.id} ({self.record.kind})"

    def state(self) -> JobState:
        """What the cluster knows of the job."""
        return self.launcher.state(self.record.id)


def cluster_run(run_dir: RunDir) -> ClusterRun | None:
    """The submitted run of a directory; None for a run of this machine."""
    record = read_record(run_dir)
    if record is None:
        return None
    return ClusterRun(run_dir=run_dir, record=record)


def seen_run_dir(run_dir: RunDir) -> RunDir | None:
    """Where the files of a run are on this machine; None if only a cluster sees them."""
    run = cluster_run(run_dir)
    return run_dir if run is None else run.here


def shown_run(run_dir: RunDir) -> str:
    """A run as a user names it: its name, or else the path of its directory."""
    in_default_folder = run_dir.path.parent == RUNS.absolute()
    return shlex.quote(run_dir.path.name if in_default_folder else str(run_dir.path))


def how_to_return(run_dir: RunDir) -> str:
    """A remedy: the commands that follow and stop a run."""
    name = shown_run(run_dir)
    return f"to follow it: {command('logs', name, '-f')}; to stop it: {command('stop', name)}"


def exit_code(run: ClusterRun, state: JobState) -> int:
    """The exit code of a run that has ended, as a local run has it.

    A job that the cluster stopped has none of its own: then the state of the run tells.
    """
    # 1. The driver's own, if it came to an end of its own.
    if state.exit_code is not None:
        return state.exit_code
    # 2. What the driver has recorded. It may have been killed before it recorded anything.
    here = run.here
    try:
        record = read_run_state(here) if here is not None else None
    except StageError:
        record = None
    states = {stage.state for stage in record.stages.values()} if record is not None else set()
    if states == {"done"}:
        return 0
    # 3. Without a failure it was stopped from outside, and can be resumed.
    return StageError.exit_code if "failed" in states else Interrupted.exit_code
