"""Runs of a small job under Slurm, submitted by a user on the login machine."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import file_digest
from pipeline.layout import RunDir
from tests.cluster import training_events
from tests.cluster.processes import wait_until
from tests.cluster.ray_runs import PreparedJob
from tests.cluster.slurm_machines import SlurmMachines

END_S = 300.0
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
CLUSTER = """
kind: slurm
nodes: {nodes}
devices_per_node: 1
min_nodes: {min_nodes}
device: cpu
threads: 1
loader_threads: 1
wait: {wait}
grace: 30
runs: {runs}
slurm:
  partition: {partition}
  time: "01:00:00"
  setup: {setup}
"""


@dataclass(kw_only=True)
class SlurmRun:
    """A run that was submitted."""

    slurm: SlurmMachines
    run_dir: RunDir
    job_id: str
    output: str  # of the command that submitted it

    @property
    def info(self) -> dict[str, str]:
        return self.slurm.job(self.job_id)

    @property
    def state(self) -> str:
        return self.info["JobState"]

    @property
    def attempts(self) -> int:
        return int(self.info["Restarts"]) + 1

    @property
    def log(self) -> str:
        """What the batch job has written."""
        path = self.run_dir.batch_log
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def step(self) -> int:
        return max((event.step for event in training_events.pretraining(self.run_dir)), default=0)

    @property
    def starts(self) -> list[int]:
        """The steps at which groups of processes began."""
        return training_events.starts(self.run_dir)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: self.step >= step, f"step {step}")

    def wait_for(self, condition: Callable[[], bool], aim: str, seconds: float = END_S) -> None:
        """Wait for a condition, which must come before the end of the job."""

        def met() -> bool:
            if condition():
                return True
            assert self.state not in ENDED or condition(), f"ended before {aim}:\n{self.log}"
            return False

        wait_until(met, aim, seconds, poll_s=0.3)

    def finish(self, state: str = "COMPLETED", seconds: float = END_S) -> None:
        """Wait for the end of the job, and for its machines to have nothing on them."""
        try:
            wait_until(lambda: self.state in ENDED, f"the end of {self.job_id}", seconds, 0.3)
        except TimeoutError:
            raise AssertionError(f"{self.info}\n{self.log}") from None
        assert self.state == state, f"{self.info}\n{self.log}"

    def weights(self) -> str:
        return file_digest(self.run_dir.weights("pretrain"))


@dataclass(kw_only=True)
class Submitter:
    """Submits runs of one job; each starts with prepared data."""

    slurm: SlurmMachines
    job: PreparedJob

    def start(
        self,
        name: str,
        *overrides: str,
        nodes: int = 2,
        min_nodes: int = 0,
        partition: str = "normal",
        setup: Sequence[str] = (),
        wait: int = 60,
    ) -> SlurmRun:
        """Submit a run, and return at once."""
        cluster = self.job.folder / f"{name}-cluster.yaml"
        cluster.write_text(
            CLUSTER.format(
                nodes=nodes,
                min_nodes=min_nodes or nodes,
                partition=partition,
                wait=wait,
                setup=json.dumps(list(setup)),
                runs=self.job.folder,
            )
        )
        job = self.job.folder / "job.yaml"
        job.write_text(self.job.text)
        run_dir = self.job.start_copy(name)
        return self.submit(job, run_dir, "--on", str(cluster), *overrides)

    def again(self, run: SlurmRun) -> SlurmRun:
        """Submit a run that was stopped again, with the same command."""
        cluster = self.job.folder / f"{run.run_dir.path.name}-cluster.yaml"
        return self.submit(self.job.folder / "job.yaml", run.run_dir, "--on", str(cluster))

    def submit(self, job: Path, run_dir: RunDir, *options: str) -> SlurmRun:
        """``pipeline run JOB --on CLUSTER -d``, as a user types it."""
        done = self.slurm.login.run(
            *(sys.executable, "-m", "pipeline", "run", job),
            *("--run-dir", run_dir.path, "-d", *options),
            environment=self.slurm.environment,
            timeout=120,
        )
        record = json.loads(run_dir.cluster_json.read_text())
        return SlurmRun(slurm=self.slurm, run_dir=run_dir, job_id=record["id"], output=done.stdout)


def left_behind(slurm: SlurmMachines) -> dict[str, list[str]]:
    """Processes and temporary files of jobs, by machine."""
    left: dict[str, list[str]] = {}
    for name, machine in slurm.fabric.machines.items():
        processes = [
            line
            for line in machine.run("ps", "-eo", "args").stdout.splitlines()
            if re.search(r"ray|pipeline|gcs_server|slurmstepd: \[\d", line)
        ]
        files = machine.run("ls", "-A", "/tmp", "/dev/shm").stdout.split()
        rest = [entry for entry in files if re.match(r"revcol|ray|pymp|torch|plasma", entry)]
        if processes or rest:
            left[name] = processes + rest
    return left


def wait_for_nothing_left(slurm: SlurmMachines, seconds: float = 180) -> None:
    """Wait until no process and no file of a job is left on any machine."""
    try:
        wait_until(lambda: not left_behind(slurm), "clean machines", seconds, 0.5)
    except TimeoutError:
        raise AssertionError(left_behind(slurm)) from None
