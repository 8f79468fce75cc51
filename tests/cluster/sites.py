"""Where a user sits, and the cluster that the commands talk to: for the contract of the verbs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.fabric import Fabric, FabricMachine, environment_of_machine
from tests.cluster.kubernetes_site import kubernetes_cluster
from tests.cluster.processes import children, wait_until
from tests.cluster.ray_machines import RayMachines
from tests.cluster.slurm_machines import SlurmMachines, install

END_S = 240.0
JOB = """
name: small
model: {channels: [8, 8, 8, 8], depths: [1, 1, 1, 1], columns: 1}
cluster: {processes: 2, device: cpu, threads: 1, loader_threads: 1}
data:
  synthetic: {classes: 3, images_per_class: 24, validation_per_class: 4, corrupt_fraction: 0}
  min_side: 16
  shard_rows: 30
stages:
  prepare: {}
  pretrain:
    {image_size: 64, epochs: 60, global_batch: 8, precision: fp32, base_lr: 1e-3, warmup_epochs: 1,
     eval_every_epochs: 60, log_every_steps: 1, checkpoint_every_steps: 15,
     intermediate_supervision: false, augment: {mixup: 0, cutmix: 0}}
  export: {from: pretrain}
"""
CLUSTER = "nodes: 1\ndevices_per_node: 2\ndevice: cpu\nthreads: 1\nloader_threads: 1\ngrace: 60\n"


@dataclass(kw_only=True)
class Command:
    """A command of the user that runs in the background; its output goes to a file."""

    process: subprocess.Popen[str]
    output_file: Path
    on_machine: bool
    limit_s: float = END_S

    @property
    def output(self) -> str:
        return self.output_file.read_text(errors="replace")

    def interrupt(self) -> None:
        """Ctrl-C."""
        pids = children(self.process.pid) if self.on_machine else [self.process.pid]
        for pid in pids:
            os.kill(pid, signal.SIGINT)

    def wait_for(self, text: str) -> None:
        """Wait for a text in the output."""
        self.wait_for_match(re.escape(text))

    def wait_for_match(self, pattern: str) -> re.Match[str]:
        """Wait for a text that matches; returns the match."""

        def is_there() -> bool:
            return bool(re.search(pattern, self.output)) or self.process.poll() is not None

        wait_until(is_there, pattern, self.limit_s, poll_s=0.2)
        match = re.search(pattern, self.output)
        assert match, self.output
        return match

    def end(self) -> int:
        """Wait for the end; returns the exit code."""
        return self.process.wait(self.limit_s)


@dataclass(kw_only=True)
class Site:
    """A folder with a job, and a user in it.

    Attributes:
        kind: local, ray, slurm or kubernetes.
        machine: where the user sits; None: the host.
        options: of ``run``, to run on the cluster.
        sees_runs: the user's machine sees the run directories of the cluster.
        hidden: a folder of the host that the user does not see.
    """

    kind: str
    folder: Path
    machine: FabricMachine | None = None
    options: Sequence[str] = ()
    sees_runs: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    hidden: Path | None = None
    _started: int = 0

    def start(self, *arguments: str) -> Command:
        """Start ``pipeline ARGUMENTS`` in the folder."""
        self._started += 1
        output = self.folder / f"output-{self._started}.txt"
        words = ["env", "-C", str(self.folder), sys.executable, "-m"]
        words += ["pipeline", *arguments]
        if self.hidden is not None:
            hide = f'mount -t tmpfs none {self.hidden} && exec "$@"'
            words = ["unshare", "-m", "sh", "-c", hide, "sh", *words]
        with open(output, "w") as file:
            if self.machine is not None:
                process: subprocess.Popen[str] = self.machine.popen(
                    *words, output=file, environment=self.environment
                )
            else:
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env=environment_of_machine(self.environment),
                    start_new_session=True,
                )
        return Command(process=process, output_file=output, on_machine=self.machine is not None)

    def call(self, *arguments: str) -> tuple[int, str]:
        """(exit code, output) of a command."""
        command = self.start(*arguments)
        return command.end(), command.output

    def run(self, *arguments: str) -> tuple[int, str]:
        """``run`` on the cluster, until it ends."""
        return self.call("run", "job.yaml", *self.options, *arguments)


def local_site(folder: Path) -> Site:
    """The host, without a cluster."""
    (folder / "job.yaml").write_text(JOB)
    return Site(kind="local", folder=folder)


@contextlib.contextmanager
def ray_site(folder: Path) -> Iterator[Site]:
    """A Ray of one machine, and a user on another one, who does not see its run directories."""
    (folder / "job.yaml").write_text(JOB)
    with Fabric(shared=[folder]) as fabric:
        cluster = RayMachines(folder=folder)
        cluster.head(fabric.up("n1"), "--cpus", "2")
        (folder / "cluster.yaml").write_text(
            f"kind: ray\n{CLUSTER}runs: /tmp/runs\n"
            f"ray: {{address: '{cluster.dashboard}', token_file: {cluster.token}}}\n"
        )
        yield Site(
            kind="ray",
            folder=folder,
            machine=fabric.up("n2"),
            options=("--on", "cluster.yaml"),
            sees_runs=False,
        )


@contextlib.contextmanager
def slurm_site(folder: Path) -> Iterator[Site]:
    """A Slurm of three machines, and a user on a fourth one, who sees the run directories."""
    install()
    (folder / "job.yaml").write_text(JOB)
    (folder / "cluster.yaml").write_text(f"kind: slurm\n{CLUSTER}runs: {folder / 'runs'}\n")
    with Fabric(shared=[folder]) as fabric:
        machines = SlurmMachines(fabric=fabric, folder=folder)
        machines.up()
        yield Site(
            kind="slurm",
            folder=folder,
            machine=machines.login,
            options=("--on", "cluster.yaml"),
            environment=machines.environment,
        )


@contextlib.contextmanager
def kubernetes_site(folder: Path) -> Iterator[Site]:
    """A Kubernetes cluster, and a user on the host, who does not see its volumes."""
    (folder / "job.yaml").write_text(JOB)
    with kubernetes_cluster(folder) as cluster:
        cluster_file = cluster.cluster_file(folder, devices=2)
        yield Site(
            kind="kubernetes",
            folder=folder,
            options=("--on", str(cluster_file)),
            sees_runs=False,
            environment=cluster.environment,
            hidden=cluster.claim,
        )
