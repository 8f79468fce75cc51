"""Talks to Slurm through its own commands. Works without accounting (``sacct``)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from pipeline.cluster import allocation, slurm_script
from pipeline.cluster.allocation import Allocation
from pipeline.cluster.launcher import JobState, Phase, Submission, cause_in
from pipeline.config.schema import ClusterConfig
from pipeline.errors import ConfigError, StageError
from pipeline.layout import RunDir

_ANSWER_S = 30.0
_CALL_S = 120.0  # longest time of a short command on the cluster, a free machine included
_PENDING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED"),
}
# What Slurm says of a job that it would accept, but cannot start now.
_LATER = ("not available (down", "busy", "drained")
# Which key of the job a refusal is about, by a word in Slurm's message.
_KEYS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "feature": "constraint",
    "time limit": "time",
    "gres": "gpu_option",
}


class Slurm:
    """The launcher of a Slurm cluster. See ``launcher.Launcher``."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster = cluster
        self._allocation = Allocation()

    def check(self, submission: Submission) -> None:
        """Ask Slurm whether it would accept the script.

        Raises:
            ConfigError: no sbatch here, or an unknown partition, account, constraint or option.
        """
        if allocation.job_at_hand():
            allocation.check(submission)
            return
        done = _command(["sbatch", "--test-only"], script=slurm_script.render(submission))
        # The answer is on standard error, also if the job is accepted: "Job 7 to start at ...".
        if done.returncode != 0 and not any(word in done.stderr for word in _LATER):
            raise _refused(done.stderr)

    def render(self, submission: Submission) -> str:
        """The batch script."""
        return slurm_script.render(submission)

    def submit(self, submission: Submission) -> str:
        """Submit the batch script; machines that failed the last checks are left out.

        Inside of an allocation, run it there.
        """
        if allocation.job_at_hand():
            nodes = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
            first = _command(nodes).stdout.split()[0]
            return self._allocation.start(slurm_script.render(submission), first)
        run = RunDir(submission.run_dir)
        if not submission.cluster.runs:
            # Slurm opens the log before the script runs, and creates no folder.
            run.logs.mkdir(parents=True, exist_ok=True)
        options = ["--parsable"]
        if unfit := _lines(run.unfit):
            options.append(f"--exclude={','.join(unfit)}")
        done = _command(["sbatch", *options], script=slurm_script.render(submission))
        if done.returncode != 0:
            raise _without_unfit(run, unfit) if unfit else _refused(done.stderr)
        return done.stdout.strip().partition(";")[0]  # "12;cluster" with several clusters

    def state(self, job_id: str) -> JobState:
        """What Slurm knows of a job. It forgets a job some minutes after its end."""
        if allocation.is_inside(job_id):
            return self._allocation.state(job_id)
        done = _command(["scontrol", "show", "job", "--oneliner", job_id])
        if done.returncode != 0:
            if "Invalid job id" not in done.stderr:
                raise _unreachable(done.stderr)
            return JobState(phase="unknown", reason="Slurm has forgotten the job")
        return parse_state(done.stdout)

    def stop(self, job_id: str, *, now: bool) -> None:
        """Ask the script to end the driver; ``now``: cancel the job.

        After ``now`` the driver has Slurm's KillWait (30 s) to save.
        """
        if allocation.is_inside(job_id):
            self._allocation.stop(job_id, now=now)
            return
        if now or self.state(job_id).phase == "pending":
            _command(["scancel", job_id])
            return
        # The script would requeue the job: the user's mark in the run directory may be out of
        # reach of this machine.
        _command(["scontrol", "update", f"JobId={job_id}", "Requeue=0"])
        _command(["scancel", "--signal=USR1", "--batch", job_id])

    def log(self, job_id: str, run_dir: Path, offset: int) -> bytes:
        """The output of the batch job, from the file or, if it is not here, through Slurm."""
        path = RunDir(run_dir).batch_log
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            file.seek(offset)
            return file.read()
        if not self._cluster.runs:
            return b""
        inside = self.state(job_id).phase == "running"
        job = job_id.partition("+")[0]
        # A step inside of the job needs no free machine.
        where = [f"--jobid={job}", "--overlap"] if inside else _placement(self._cluster)
        command = ["tail", "-c", f"+{offset + 1}", str(path)]
        return _on_a_machine([*where, *command]).stdout.encode()

    def call(self, cluster: ClusterConfig, arguments: Sequence[str]) -> str:
        """Run a short command of the pipeline on a machine of the partition."""
        python = "python" if cluster.slurm.container else sys.executable
        command = [python, "-m", "pipeline", *arguments]
        done = _on_a_machine([*_placement(cluster), *command])
        if done.returncode != 0:
            cause = cause_in(done.stderr) or cause_in(done.stdout)
            raise StageError(
                f"`pipeline {' '.join(arguments)}` failed on the cluster: {cause}", place="srun"
            )
        return done.stdout

    def viewer(self, name: str, run_dir: Path) -> str:
        """Nothing of that kind: the files are brought to this machine."""
        return ""


def parse_state(text: str) -> JobState:
    """The state in a line of ``scontrol show job --oneliner``.

    Example: "JobId=7 JobName=a b JobState=PENDING Reason=Resources Restarts=1 ..." -> pending.
    """
    # The name may contain anything, also "JobState=". UserId follows it. A comment, which may
    # contain anything too, comes last: of each key, the first one counts.
    after_name = text[text.rfind(" UserId=") + 1 :]
    values = dict(reversed(re.findall(r"(\w+)=(\S*)", after_name)))
    word = values.get("JobState", "")
    phase: Phase = "pending" if word in _PENDING else "ended" if word in _ENDED else "running"
    reason = values.get("Reason", "")
    start = _seconds(values.get("StartTime", ""))
    end = _seconds(values.get("EndTime", ""))
    code, _, signal_number = values.get("ExitCode", "0:0").partition(":")
    # A job that was cancelled before it started has the code 0, too.
    cancelled = word == "CANCELLED" and code == "0"
    has_own_code = phase == "ended" and signal_number == "0" and not cancelled
    return JobState(
        phase=phase,
        reason=word if phase == "ended" else "" if reason == "None" else reason,
        expected_start=start if phase == "pending" else None,
        started=None if phase == "pending" else start,
        ended=end if phase == "ended" else None,
        ends_by=end if phase == "running" else None,
        exit_code=int(code) if has_own_code else None,
        attempts=int(values.get("Restarts", "0")) + 1,
    )


def _placement(cluster: ClusterConfig) -> list[str]:
    """Options of srun for a short command on one machine."""
    slurm = cluster.slurm
    options = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        # Minutes. A short limit lets the scheduler fit it in between jobs.
        "time": "5",
    }
    return [f"--{name}={value}" for name, value in options.items() if value]


def _on_a_machine(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command on a machine of the cluster."""
    options = ["--nodes=1", "--ntasks=1", "--quiet", "--input=none"]
    return _command(["srun", *options, *arguments], timeout=_CALL_S)


def _command(
    command: Sequence[str], *, script: str = "", timeout: float = _ANSWER_S
) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm.

    Raises:
        ConfigError: it is not installed, or does not answer.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"the command {command[0]} is not on this machine",
            place="cluster.kind: slurm",
            remedy="run this on a login node of the Slurm cluster, or load its module",
        )
    try:
        return subprocess.run(
            command,
            input=script,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            # A user's own format could not be read back.
            env=os.environ | {"SLURM_TIME_FORMAT": "standard"},
        )
    except subprocess.TimeoutExpired:
        raise _unreachable(f"{command[0]} does not answer within {timeout:g} s") from None


def _refused(message: str) -> ConfigError:
    """Slurm's refusal of a job; names the key of the job that it is about."""
    # Example: "allocation failure: Invalid partition name specified".
    cause = cause_in(message.replace("sbatch: error: ", "").replace("allocation failure: ", ""))
    key = next((key for word, key in _KEYS.items() if word in cause.lower()), "")
    asked = "`sinfo` lists partitions and features, `sacctmgr show assoc user=$USER` accounts"
    return ConfigError(
        f"Slurm refuses the job: {cause}",
        place=f"cluster.slurm.{key}" if key else "cluster.slurm",
        remedy=asked,
    )


def _without_unfit(run: RunDir, unfit: Sequence[str]) -> ConfigError:
    """Slurm accepts the job, as ``check`` has shown, but not without these machines."""
    return ConfigError(
        f"too few machines are left without those that failed the last checks: {', '.join(unfit)}",
        place=str(run.unfit),
        remedy="have them repaired, then delete this file",
    )


def _unreachable(message: str) -> ConfigError:
    return ConfigError(
        f"Slurm does not answer: {cause_in(message)}",
        place="cluster.kind: slurm",
        remedy="see `scontrol ping`, and rerun the command when the controller is up",
    )


def _seconds(text: str) -> float | None:
    """A time of Slurm ("2026-01-31T12:00:00", "Unknown") in seconds since 1970."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
