"""A small job on machines of the tests, and what a disturbance costs it.

The data is prepared once, on the host. Every scenario starts from a copy of that run directory and
trains on the machines. ``weights`` of an undisturbed run are what the others are compared with.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.files import file_digest
from pipeline.layout import RunDir
from tests.cluster import training_events
from tests.cluster.fabric import FabricMachine, MachineProcess, environment_of_machine
from tests.cluster.processes import wait_until
from tests.cluster.ray_machines import RayMachines
from tests.prepare.source_folders import class_tars

CHECKPOINT_STEPS = 6
END_S = 240.0
JOB = """
name: small
model: {{channels: [8, 16, 24, 32], depths: [1, 1, 2, 1], columns: 4, drop_path: 0.1}}
data: {{root: {root}, min_side: 16, shard_rows: 30}}
stages:
  prepare: {{}}
  pretrain:
    {{image_size: 64, epochs: 6, global_batch: {batch}, precision: fp32,
     base_lr: 1e-3, base_lr_batch: 16, warmup_epochs: 1,
     log_every_steps: 1, checkpoint_every_steps: 6, eval_every_epochs: 6}}
"""
CLUSTER = """
cluster:
  {{kind: ray, nodes: {nodes}, devices_per_node: {devices}, min_nodes: {min_nodes}, device: cpu,
   threads: 1, loader_threads: 1, wait: {wait}, grace: 60, ray: {{address: "http://n1:8265"}}}}
"""


@dataclass(frozen=True)
class PreparedJob:
    """A job, and a run directory in which its data is prepared."""

    folder: Path
    batch: int = 16

    @property
    def text(self) -> str:
        return JOB.format(root=self.folder / "images", batch=self.batch)

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def prepare(self) -> None:
        """Make the images (112 for training), and prepare them on the host."""
        class_tars(self.folder / "images", classes=4, count=28, validation=4)
        job = self.folder / "local.yaml"
        job.write_text(self.text + "cluster: {processes: 1, device: cpu}\n")
        self.local(self.base, "--stage", "prepare")

    def local(self, run_dir: Path, *arguments: str) -> None:
        """Run the job on the host, without a cluster."""
        job = self.folder / "local.yaml"
        command = [sys.executable, "-m", "pipeline", str(job), "--run-dir", str(run_dir)]
        subprocess.run(
            [*command, *arguments], check=True, env=environment_of_machine(), cwd=self.folder
        )

    def start_copy(self, name: str) -> RunDir:
        """A new run directory with the prepared data."""
        shutil.copytree(self.base, self.folder / name)
        return RunDir(self.folder / name)

    def undisturbed_weights(self) -> str:
        """Digest of the weights of a run on one machine, with two processes."""
        run_dir = self.start_copy("undisturbed")
        self.local(run_dir.path, "--set", "cluster.processes=2")
        return file_digest(run_dir.weights("pretrain"))

    def on_cluster(
        self, *, nodes: int = 2, devices: int = 1, min_nodes: int = 0, wait: int = 60
    ) -> Path:
        """A job file for a cluster of that size."""
        path = self.folder / f"ray-{nodes}-{devices}-{min_nodes}-{wait}.yaml"
        text = CLUSTER.format(nodes=nodes, devices=devices, min_nodes=min_nodes or nodes, wait=wait)
        path.write_text(self.text + text)
        return path


@dataclass(kw_only=True)
class ClusterRun:
    """The driver of a job, on a machine of a Ray cluster."""

    run_dir: RunDir
    process: MachineProcess
    started: float = field(default_factory=time.time)

    @classmethod
    def start(
        cls,
        machine: FabricMachine,
        cluster: RayMachines,
        job: Path,
        run_dir: RunDir,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
    ) -> ClusterRun:
        output = run_dir.path.with_suffix(".out")
        with open(output, "a") as file:
            process = machine.popen(
                *["python", "-m", "pipeline", "run", job],
                *["--run-dir", run_dir.path, *arguments],
                environment={
                    **cluster.environment,
                    "PIPELINE_RAY_ADDRESS": cluster.gcs,
                    **(environment or {}),
                },
                output=file,
            )
        return cls(run_dir=run_dir, process=process)

    @property
    def output(self) -> str:
        return self.run_dir.path.with_suffix(".out").read_text()

    @property
    def step(self) -> int:
        """The last step that was logged since the start of this driver."""
        steps = [
            event.step
            for event in training_events.pretraining(self.run_dir)
            if event.time > self.started
        ]
        return max(steps, default=0)

    @property
    def starts(self) -> list[int]:
        """The steps at which groups of processes began."""
        return training_events.starts(self.run_dir)

    def wait_for_step(self, step: int) -> None:
        self._wait(lambda: self.step >= step, f"step {step}")

    def wait_for_output(self, pattern: str, seconds: float = END_S) -> float:
        """Wait for a message; returns the seconds that it took."""
        began = time.monotonic()
        self._wait(lambda: re.search(pattern, self.output) is not None, pattern, seconds)
        return time.monotonic() - began

    def _wait(self, condition: object, aim: str, seconds: float = END_S) -> None:
        assert callable(condition)

        def met() -> bool:
            if condition():
                return True
            assert self.process.poll() is None, f"ended before {aim}:\n{self.output}"
            return False

        wait_until(met, aim, seconds, poll_s=0.05)

    def finish(self, code: int = 0) -> str:
        """Wait for the end; returns the output."""
        assert self.process.wait(END_S) == code, self.output
        return self.output

    def losses(self, group: int) -> dict[int, float]:
        """Loss by step in one of the groups of processes, counted from 0."""
        losses: dict[int, float] = {}
        number = -1
        for event in training_events.pretraining(self.run_dir):
            number += event.kind == "start"
            if event.kind == "step" and number == group:
                losses[event.step] = event.scalars["loss/total"]
        return losses

    @property
    def machines(self) -> list[str]:
        """The machines of the newest group, by rank."""
        line = re.findall(r"^ranks? 0.* on .*$", self.output, re.MULTILINE)[-1]
        return re.findall(r"on (n\d) ", line.partition("; idle")[0])
