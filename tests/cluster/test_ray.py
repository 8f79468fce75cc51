"""A job on a Ray cluster of three machines, through losses of every kind.

Undisturbed weights are the yardstick: "equal" means the bytes of ``weights.safetensors`` of a run
of two processes on one machine. Times are asserted with three times what is expected of them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.layout import RunDir
from tests.cluster.fabric import Fabric, FabricMachine
from tests.cluster.ray_machines import RayMachines
from tests.cluster.ray_runs import CHECKPOINT_STEPS, ClusterRun, PreparedJob
from tests.e2e.job_runs import results

NAMES = ("n1", "n2", "n3")  # n1 is the head, with the driver
Record = pytest.FixtureRequest


class Site:
    """Three machines with Ray, and a job whose data is prepared."""

    def __init__(self, fabric: Fabric, folder: Path) -> None:
        self.fabric = fabric
        self.ray = RayMachines(folder=folder)
        self.job = PreparedJob(folder)

    def repair(self) -> None:
        """Bring back every machine that a scenario has taken away."""
        if "n1" not in self.fabric.machines:
            for machine in list(self.fabric.machines.values()):
                machine.kill()
            self.ray.head(self.fabric.up("n1"), "--cpus", "2")
        for name in NAMES[1:]:
            machine = self.fabric.machines.get(name)
            if machine is not None and self.ray.nodes[name].poll() is not None:
                machine.kill()
                machine = None
            if machine is None:
                self.ray.join(self.fabric.up(name), "--cpus", "2")

    def start(self, job: Path, run_dir: RunDir, *arguments: str) -> ClusterRun:
        return ClusterRun.start(self.fabric["n1"], self.ray, job, run_dir, *arguments)


@pytest.fixture(scope="module")
def built(fabric: Fabric, shared_folder: Path) -> Site:
    site = Site(fabric, shared_folder)
    site.job.prepare()
    return site


@pytest.fixture
def site(built: Site) -> Site:
    built.repair()
    return built


@pytest.fixture(scope="module")
def reference(built: Site) -> RunDir:
    """The whole job on one machine."""
    run_dir = built.job.start_copy("reference")
    built.job.local(run_dir.path, "--set", "cluster.processes=2")
    return run_dir


def weights(run_dir: RunDir) -> bytes:
    return run_dir.weights("pretrain").read_bytes()


def machines_of(run: ClusterRun) -> list[str]:
    """The machines of the newest group, by rank."""
    line = re.findall(r"^ranks? 0.* on .*$", run.output, re.MULTILINE)[-1]
    return re.findall(r"on (n\d) ", line.partition("; idle")[0])


def lost_steps(run: ClusterRun) -> int:
    """Steps that the second group repeated."""
    events = run.events
    second = [number for number, event in enumerate(events) if event.kind == "start"][1]
    return max(event.step for event in events[:second]) - events[second].step


def lose(machine: FabricMachine, how: str) -> None:
    if how == "raylet killed":
        [pid] = machine.pids("raylet/raylet")
        os.kill(pid, signal.SIGKILL)
    elif how == "processes killed":
        machine.kill()
    elif how == "link cut":
        machine.cut()
    else:
        machine.run("pkill", "-TERM", "-f", "pipeline node join")


@pytest.mark.parametrize(
    ("how", "known_s", "most_lost"),
    [
        ("raylet killed", 5, CHECKPOINT_STEPS),
        ("processes killed", 5, CHECKPOINT_STEPS),
        ("link cut", 20, CHECKPOINT_STEPS),
        ("drained", 1, 0),
    ],
)
def test_a_lost_machine_costs_no_more_than_the_last_checkpoint(
    site: Site,
    reference: RunDir,
    record_property: object,
    how: str,
    known_s: float,
    most_lost: int,
) -> None:
    run = site.start(
        site.job.on_cluster(), site.job.start_copy(how.replace(" ", "-")), "--stage", "pretrain"
    )
    run.wait_for_step(CHECKPOINT_STEPS + 3)
    name = next(name for name in machines_of(run) if name != "n1")
    lose(site.fabric[name], how)
    known = run.wait_for_output(r"is leaving: asking|error: pretrain: .*(died|failed)")
    run.finish()
    if how == "link cut":
        site.fabric[name].kill()
    assert callable(record_property)
    record_property("known after", f"{known:.1f} s")
    record_property("steps lost", lost_steps(run))
    assert known < 3 * known_s
    assert lost_steps(run) <= most_lost
    assert weights(run.run_dir) == weights(reference)
    assert "\x1b[" not in run.output
    if how != "drained":
        assert re.search(rf"rank \d on {name} \(10\.77\.0\.\d\) died", run.output)
