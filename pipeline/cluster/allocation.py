"""Runs inside of an allocation that the user already has: ``salloc``, or a batch job of their own.

Nothing is submitted. The batch script runs as a step on the first machine of the allocation,
started by a process of srun on this machine, and is never requeued. The ID of such a run is
"<job>+<process ID of srun>": whether it is under way can only be seen from this machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from pipeline.cluster.launcher import JobState, Submission
from pipeline.errors import ConfigError

_SEPARATOR = "+"


def job_at_hand() -> str:
    """ID of the allocation that this process belongs to; "" outside of one."""
    return os.environ.get("SLURM_JOB_ID", "")


def is_inside(run_id: str) -> bool:
    """True if a run was started inside of an allocation."""
    return _SEPARATOR in run_id


def check(submission: Submission) -> None:
    """Raises ConfigError if the allocation has not the machines of the job."""
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if nodes != submission.cluster.nodes:
        raise ConfigError(
            f"this allocation has {nodes} machines, the job needs {submission.cluster.nodes}",
            place="cluster.nodes",
            remedy=f"--set cluster.nodes={nodes}, or run it outside of the allocation",
        )


class Allocation:
    """Starts scripts in the allocation at hand, and knows how those of this process ended."""

    def __init__(self) -> None:
        self._started: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, script: str, first: str) -> str:
        """Run a script on the machine ``first``; returns the ID of the run."""
        where = ["--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={first}"]
        process = subprocess.Popen(
            ["srun", *where, "bash", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the script writes into the log of the run
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C ends the command that follows the run, not the run
        )
        self._started[process.pid] = process
        return f"{job_at_hand()}{_SEPARATOR}{process.pid}"

    def state(self, run_id: str) -> JobState:
        """The state of a run; its exit code only for the process that has started it."""
        pid = _pid(run_id)
        if process := self._started.get(pid):
            code = process.poll()
            return JobState(phase="running" if code is None else "ended", exit_code=code)
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            arguments = []
        return JobState(phase="running" if arguments[:1] == [b"srun"] else "ended")

    def stop(self, run_id: str, *, now: bool) -> None:
        """Srun passes USR1 on to the script, and ends it after a second SIGINT."""
        if not self.state(run_id).under_way:
            return
        pid = _pid(run_id)
        os.kill(pid, signal.SIGTERM if now else signal.SIGUSR1)


def _pid(run_id: str) -> int:
    return int(run_id.partition(_SEPARATOR)[2])
