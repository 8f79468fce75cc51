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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.layout import RunDir
from pipeline.monitor.events import Event, read_events
from tests.cluster.fabric import Fabric, MachineProcess, environment_of_machine
from tests.cluster.processes import wait_until
from tests.cluster.ray_machines import RayMachines
from tests.prepare.source_folders import class_tars

STEPS = 42
CHECKPOINT_STEPS = 6
END_S = 240.0
JOB = """
name: small
model: {{channels: [8, 16, 24, 32], depths: [1, 1, 2, 1], columns: 4, drop_path: 0.1}}
data: {{root: {root}, min_side: 16, shard_rows: 30}}
stages:
  prepare: {{}}
  pretrain:
    {{image_size: 64, epochs: 6, global_batch: 16, precision: fp32,
     base_lr: 1e-3, base_lr_batch: 16, warmup_epochs: 1,
     log_every_steps: 1, checkpoint_every_steps: 6, eval_every_epochs: 6}}
  finetune:
    {{from: pretrain, image_size: 32, epochs: 1, global_batch: 16, precision: fp32,
     base_lr: 1e-3, base_lr_batch: 16, intermediate_supervision: false,
     augment: {{mixup: 0, cutmix: 0}}}}
  evaluate: {{from: finetune}}
  export: {{from: finetune}}
"""
CLUSTER = """
kind: ray
nodes: {nodes}
devices_per_node: {devices}
min_nodes: {min_nodes}
device: cpu
threads: 1
loader_threads: 1
wait: {wait}
grace: 60
ray: {{address: "{dashboard}", token_file: {token}}}
"""


@dataclass(frozen=True)
class PreparedJob:
    """A job, and a run directory in which its data is prepared."""

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "small.yaml"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def prepare(self) -> None:
        """Make the images (112 for training), and prepare them on the host."""
        class_tars(self.folder / "images", classes=4, count=28, validation=4)
        self.path.write_text(JOB.format(root=self.folder / "images"))
        self.local(self.base, "--stage", "prepare")

    def local(self, run_dir: Path, *arguments: str) -> None:
        """Run the job on the host in two processes, without a cluster."""
        command = ["nice", "-n", "19", sys.executable, "-m", "pipeline", "run", str(self.path)]
        command += ["--run-dir", str(run_dir), "--set", "cluster={processes: 2, device: cpu}"]
        subprocess.run(
            [*command, *arguments], check=True, env=environment_of_machine(), cwd=self.folder
        )

    def start_copy(self, name: str) -> RunDir:
        """A new run directory with the prepared data."""
        shutil.copytree(self.base, self.folder / name)
        return RunDir(self.folder / name)

    def cluster(
        self,
        ray: RayMachines,
        *,
        nodes: int = 2,
        devices: int = 1,
        min_nodes: int | None = None,
        wait: int = 60,
    ) -> Path:
        """A cluster file of that size."""
        path = self.folder / f"ray-{nodes}-{devices}-{min_nodes}-{wait}.yaml"
        text = CLUSTER.format(
            nodes=nodes,
            devices=devices,
            min_nodes=min_nodes or nodes,
            wait=wait,
            dashboard=ray.dashboard,
            token=ray.token,
        )
        path.write_text(text)
        return path


class RaySite:
    """Three machines with Ray, n1 to n3, and a job whose data is prepared. n1 is the head."""

    def __init__(self, fabric: Fabric, folder: Path) -> None:
        self.fabric = fabric
        self.ray = RayMachines(folder=folder)
        self.job = PreparedJob(folder)

    def repair(self, *without: str) -> None:
        """Bring back every machine that a scenario has taken away, and take away ``without``."""
        machines = self.fabric.machines
        for name, node in self.ray.nodes.items():
            if name in machines and node.poll() is not None:
                machines[name].kill()
        if "n1" not in machines:
            for machine in list(machines.values()):
                machine.kill()
            self.ray.head(self.fabric.up("n1"), "--cpus", "2")
        for name in ("n2", "n3"):
            if name in without and name in machines:
                machines[name].kill()
            elif name not in without and name not in machines:
                self.ray.join(self.fabric.up(name), "--cpus", "2")


@dataclass(kw_only=True)
class ClusterRun:
    """The driver of a job, on a machine of a Ray cluster."""

    run_dir: RunDir
    process: MachineProcess
    started: float = field(default_factory=time.time)

    @classmethod
    def start(
        cls,
        site: RaySite,
        run_dir: RunDir,
        *arguments: str | Path,
        job: Path | None = None,
        checks: bool = False,
        **size: int,
    ) -> ClusterRun:
        """Start the driver as a job of Ray would, on the head's machine."""
        cluster = site.job.cluster(site.ray, **size)
        variables = {**site.ray.environment, "PIPELINE_RAY_ADDRESS": site.ray.gcs}
        if not checks:  # they take some seconds
            variables |= {"PIPELINE_NO_MACHINE_CHECKS": "1"}
        command = ["nice", "-n", "19", "python", "-m", "pipeline", "run"]
        command += [str(job or site.job.path), "--on", str(cluster)]
        with open(run_dir.path.with_suffix(".out"), "a") as file:
            process = site.fabric["n1"].popen(
                *command, "--run-dir", run_dir.path, *arguments, environment=variables, output=file
            )
        return cls(run_dir=run_dir, process=process)

    @property
    def output(self) -> str:
        return self.run_dir.path.with_suffix(".out").read_text()

    @property
    def events(self) -> Sequence[Event]:
        path = self.run_dir.events("pretrain")
        return read_events(path) if path.exists() else []

    @property
    def step(self) -> int:
        """The last step that was logged since the start of this driver."""
        steps = [event.step for event in self.events if event.time > self.started]
        return max(steps, default=0)

    @property
    def starts(self) -> list[int]:
        """The steps at which groups of processes began."""
        return [event.step for event in self.events if event.kind == "start"]

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
        for event in self.events:
            number += event.kind == "start"
            if event.kind == "step" and number == group:
                losses[event.step] = event.scalars["loss/total"]
        return losses

    @property
    def machines(self) -> list[str]:
        """The machines of the newest group, by rank."""
        line = re.findall(r"^ranks? 0.* on .*$", self.output, re.MULTILINE)[-1]
        return re.findall(r"on (n\d) ", line.partition("; idle")[0])

    @property
    def lost_steps(self) -> int:
        """Steps that the second group repeated."""
        events = self.events
        second = [number for number, event in enumerate(events) if event.kind == "start"][1]
        return max(event.step for event in events[:second]) - events[second].step
