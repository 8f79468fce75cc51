"""What every way to start a run on a cluster offers: the interface of all launchers.

A submission starts one driver on the cluster: the command of ``verb``, with a job file. The
driver does what the same command does on this machine, with the cluster's machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pipeline.config.schema import ClusterConfig

# unknown: the cluster has forgotten the job, or never got it.
Phase = Literal["pending", "running", "ended", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is to run.

    Attributes:
        name: of the run, any text; a launcher derives from it what its scheduler accepts.
        cluster: the job's cluster section.
        run_dir: the run directory as the cluster's machines see it.
        job_text: the job file (YAML) for the driver; the launcher brings it to the cluster.
        verb: the command of the driver: "run" or "doctor".
        options: what follows the job file, for example ("--run-dir", "/shared/runs/a").
        attempt: number of the submission of this run, from 1.
    """

    name: str
    cluster: ClusterConfig
    run_dir: Path
    job_text: str
    verb: str = "run"
    options: tuple[str, ...] = ()
    attempt: int = 1


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What the cluster knows of a submission.

    Attributes:
        reason: of a pending job, why it waits; of an ended one, the scheduler's own word for it.
        expected_start, started, ended: seconds since 1970; None if not known.
        ends_by: when the time limit ends it (seconds since 1970); None without one.
        exit_code: of the driver of an ended job; None if the cluster does not know it.
        attempts: how often the scheduler has started it.
    """

    phase: Phase
    reason: str = ""
    expected_start: float | None = None
    started: float | None = None
    ended: float | None = None
    ends_by: float | None = None
    exit_code: int | None = None
    attempts: int = 1

    @property
    def under_way(self) -> bool:
        """True while the job may still work on its run."""
        # A job that is not known counts as ended: whatever it was, it writes nothing any more. The
        # lock of the run guards against a driver that lives all the same.
        return self.phase in ("pending", "running")


def cause_in(output: str) -> str:
    """Why a command of the pipeline failed, from its output: its error, else its last line."""
    # The remedy stands below the error, and a traceback of the cluster's own may follow both.
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1]


class Launcher(Protocol):
    """Talks to one cluster. Every call answers within seconds.

    Every method raises ConfigError if the cluster cannot be reached or refuses the caller.
    """

    def check(self, submission: Submission) -> None:
        """Ask the cluster whether it would accept the submission; starts nothing.

        Raises:
            ConfigError: no client here, a wrong token, an unknown partition, and the like.
        """

    def render(self, submission: Submission) -> str:
        """What would be submitted, as text: without secrets, the same for the same job."""

    def submit(self, submission: Submission) -> str:
        """Start it; returns the ID of the job.

        Raises:
            ConfigError: the cluster refuses it.
        """

    def state(self, job_id: str) -> JobState:
        """The present state of a job."""

    def stop(self, job_id: str, *, now: bool) -> None:
        """Ask the driver to end after a checkpoint; ``now``: end it at once.

        Returns at once. A job that has ended is no error.
        """

    def log(self, job_id: str, run_dir: Path, offset: int) -> bytes:
        """What the driver has written to its output beyond ``offset`` bytes; b"" if nothing.

        Args:
            run_dir: the run directory as the cluster sees it.
        """

    def call(self, cluster: ClusterConfig, arguments: Sequence[str]) -> str:
        """Run a command of the pipeline on one machine of the cluster; returns its output.

        For questions about files that this machine does not see: seconds, text only.

        Raises:
            StageError: the command failed; the cause is the last line that it wrote.
        """

    def viewer(self, name: str, run_dir: Path) -> str:
        """How to show the curves of a run within the cluster, as text; '': bring them here.

        Args:
            name: of the run, as a user names it.
            run_dir: the run directory as the cluster sees it.
        """
