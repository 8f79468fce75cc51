"""``pipeline node``: Ray on a machine, how it leaves and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.fabric import Fabric, FabricMachine, MachineProcess
from tests.cluster.processes import wait_until
from tests.cluster.ray_machines import DIRECTORY, RayMachines

# A driver with an actor on the machine n2: prints what it sees, and ends when a machine leaves and
# its actor has been ended, or on SIGTERM.
DRIVER = """
import os, signal, sys, time
import ray

gcs, actor_on = sys.argv[1:]
ray.init(address=gcs, log_to_driver=False, logging_level="ERROR")

def stop(number, frame):
    print("TERM", flush=True)
    time.sleep(1)  # as a driver that still writes its state
    ray.nodes()  # which needs the raylet
    print("saved", flush=True)
    os._exit(75)

signal.signal(signal.SIGTERM, stop)

@ray.remote(num_cpus=1)
class Rank:
    def mask(self):
        return signal.pthread_sigmask(signal.SIG_BLOCK, [])

def alive():
    return [n for n in ray.nodes() if n["Alive"]]

while len(alive()) < 2:
    time.sleep(0.1)
strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
node = next(n["NodeID"] for n in alive() if n["NodeManagerAddress"] == actor_on)
rank = Rank.options(scheduling_strategy=strategy(node, soft=False)).remote()
print(f"mask {sorted(map(int, ray.get(rank.mask.remote())))}", flush=True)
while True:
    time.sleep(0.05)
    leaving = ray._private.state.state.get_draining_nodes()
    if rank is not None and node in leaving:
        print("leaving", flush=True)
        time.sleep(1)  # as a rank that saves
        ray.kill(rank)
        rank = None
        print("ended", flush=True)
    if len(alive()) == 1 and rank is None:
        print("alone", flush=True)
        time.sleep(1000)
"""


@pytest.fixture
def machines(fabric: Fabric) -> Iterator[list[FabricMachine]]:
    """Two machines without anything on them."""
    machines = [fabric.up("n1"), fabric.up("n2")]
    yield machines
    for machine in list(fabric.machines.values()):
        machine.kill()


def _files(machine: FabricMachine) -> set[str]:
    """What lies in the temporary folders of a machine."""
    return set(machine.run("ls", "-A", "/tmp", "/dev/shm").stdout.split())


def _driver(
    machine: FabricMachine, cluster: RayMachines, actor_on: FabricMachine
) -> tuple[MachineProcess, Path]:
    log = cluster.folder / "driver.log"
    with open(log, "w") as output:
        process = machine.popen(
            *(sys.executable, "-c", DRIVER, cluster.gcs, actor_on.address),
            environment=cluster.environment,
            output=output,
        )
    _wait_for_line(log, "mask")
    return process, log


def _wait_for_line(log: Path, start: str, timeout_s: float = 60) -> float:
    """Wait for a line of the driver; returns the time that it took."""
    begin = time.monotonic()
    wait_until(
        lambda: any(line.startswith(start) for line in log.read_text().splitlines()),
        f"'{start}' in: {log.read_text()}",
        timeout_s,
    )
    return time.monotonic() - begin


def test_machines_leave_before_they_end_and_leave_nothing_behind(
    machines: list[FabricMachine], tmp_path_factory: pytest.TempPathFactory, shared_folder: Path
) -> None:
    first, second = machines
    before = [_files(machine) for machine in machines]
    cluster = RayMachines(folder=shared_folder)
    head = cluster.head(first)
    joined = cluster.join(second)
    assert cluster.dashboard == "http://10.77.0.1:8265"
    driver, log = _driver(first, cluster, second)

    mask = next(line for line in log.read_text().splitlines() if line.startswith("mask"))
    blocked = json.loads(mask.removeprefix("mask "))
    assert {signal.SIGTERM, signal.SIGUSR1} <= set(blocked)

    # As Slurm and Kubernetes do it: every process of the machine gets the signal, at once.
    for pid in second.pids():
        os.kill(pid, signal.SIGTERM)
    assert _wait_for_line(log, "leaving") < 10
    assert joined.poll() is None  # the raylet stays until the actor has ended
    _wait_for_line(log, "ended")
    assert joined.wait(15) == 0
    _wait_for_line(log, "alone")
    assert not second.pids()
    assert _files(second) == before[1]

    # The head passes the signal on, and stays until the driver has ended.
    head.send_signal(signal.SIGUSR1)
    assert driver.wait(30) == 75, log.read_text()
    assert log.read_text().endswith("TERM\nsaved\n")
    assert head.wait(30) == 0
    assert not first.pids()
    assert _files(first) == before[0]


def test_the_grace_is_a_limit(machines: list[FabricMachine], shared_folder: Path) -> None:
    first, second = machines
    cluster = RayMachines(folder=shared_folder, grace=3)
    head = cluster.head(first, "--no-dashboard")
    joined = cluster.join(second)
    assert not cluster.dashboard
    _driver(first, cluster, second)
    driver = first.pids("ray.init")[-1]
    os.kill(driver, signal.SIGSTOP)  # it cannot answer
    begin = time.monotonic()
    for process in (joined, head):
        process.send_signal(signal.SIGTERM)
    assert joined.wait(30) == 0
    assert head.wait(30) == 0
    assert time.monotonic() - begin < 15
    assert not second.pids()
    assert first.pids() == [driver]  # which is not the head's to kill


def test_a_dead_raylet_ends_the_machine(machines: list[FabricMachine], shared_folder: Path) -> None:
    first, second = machines
    cluster = RayMachines(folder=shared_folder)
    head = cluster.head(first, "--no-dashboard")
    joined = cluster.join(second)
    (raylet,) = second.pids("raylet/raylet")
    os.kill(raylet, signal.SIGKILL)
    assert joined.wait(30) == 3
    assert "Ray ended on this machine" in cluster.log(second).read_text()
    assert not second.pids()
    # The others end with the head.
    joined = cluster.join(second)
    head.send_signal(signal.SIGUSR2)  # at once
    assert head.wait(15) == 0
    assert joined.wait(60) == 0
    assert not second.pids()


def test_what_cannot_start_ends_with_its_cause(
    machines: list[FabricMachine], shared_folder: Path
) -> None:
    first, _ = machines
    node = ("python", "-m", "pipeline", "node")
    environment = RayMachines(folder=shared_folder).environment

    def failed(*arguments: str) -> tuple[int, str]:
        done = first.run(*node, *arguments, check=False, environment=environment, timeout=120)
        return done.returncode, done.stdout + done.stderr

    code, output = failed("head", "--directory", f"/tmp/{'long' * 12}")
    assert code == 2
    assert "too long for Ray's sockets" in output
    first.run("mkdir", "-p", "/tmp/used/here")
    code, output = failed("head", "--directory", "/tmp/used")
    assert code == 2
    assert "is not an empty directory" in output
    assert "here" in first.run("ls", "/tmp/used").stdout
    code, output = failed("join", "10.77.0.1:1", "--directory", str(DIRECTORY))
    assert code == 3
    assert "10.77.0.1:1: nothing listens at the address of the head" in output
    assert not first.pids()


def test_a_taken_dashboard_port_is_avoided(
    machines: list[FabricMachine], shared_folder: Path
) -> None:
    first, _ = machines
    listener = "import socket, time; s = socket.create_server(('', 8265)); time.sleep(1000)"
    first.popen(sys.executable, "-c", listener)
    wait_until(lambda: "8265" in first.run("ss", "-ltn").stdout, "the listener")
    cluster = RayMachines(folder=shared_folder)
    head = cluster.head(first)
    assert cluster.dashboard.startswith("http://10.77.0.1:")
    assert not cluster.dashboard.endswith(":8265")
    head.send_signal(signal.SIGTERM)
    assert head.wait(30) == 0
