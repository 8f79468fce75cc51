"""The machines of the tests are as separate as real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.fabric import ROOT, Fabric, FabricMachine, MachineError
from tests.cluster.processes import children, wait_until

Pair = tuple[FabricMachine, FabricMachine]


@pytest.fixture(scope="module")
def pair(fabric: Fabric) -> Pair:
    return fabric.up("n1"), fabric.up("n2")


def test_names_networks_and_processes_differ(pair: Pair) -> None:
    for machine in pair:
        assert machine.run("hostname").stdout.split() == [machine.name]
        assert machine.address in machine.run("ip", "-4", "addr", "show", "eth0").stdout
        process = machine.popen("sleep", "1000")
        wait_until(lambda machine=machine: machine.pids("sleep 1000"), "the process")
        assert machine.run("pgrep", "-fc", "sleep 1000").stdout.split() == ["1"]
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
        assert not machine.pids("sleep 1000")


def test_names_are_known_to_all(pair: Pair) -> None:
    first, second = pair
    assert second.address in first.run("getent", "hosts", "n2").stdout
    assert first.address in second.run("getent", "hosts", "n1").stdout


def test_only_shared_folders_are_shared(pair: Pair, shared_folder: Path) -> None:
    first, second = pair
    first.run("touch", shared_folder / "shared", "/tmp/private", "/dev/shm/private")
    assert second.run("ls", shared_folder).stdout.split() == ["shared"]
    assert "private" not in second.run("ls", "/tmp", "/dev/shm").stdout
    second.hide(shared_folder)
    assert not second.run("ls", shared_folder).stdout
    assert first.run("ls", shared_folder).stdout.split() == ["shared"]
    second.show(shared_folder)
    assert second.run("ls", shared_folder).stdout.split() == ["shared"]


def _hears(machine: FabricMachine, other: FabricMachine) -> bool:
    probe = f"import socket; socket.create_connection(({other.address!r}, 9), timeout=2)"
    error = machine.run(sys.executable, "-c", probe, check=False).stderr
    assert "Refused" in error or "timed out" in error or "No route" in error, error
    return "Refused" in error


def test_a_link_can_be_cut_and_mended(pair: Pair) -> None:
    first, second = pair
    assert _hears(first, second)
    second.cut()
    assert not _hears(first, second)
    assert not _hears(second, first)
    second.mend()
    wait_until(lambda: _hears(first, second), "the link")


def test_a_machine_that_is_killed_can_start_again(fabric: Fabric, pair: Pair) -> None:
    machine = fabric.up("n3")
    machine.run("touch", "/tmp/before")
    process = machine.popen("sleep", "1000")
    machine.kill()
    assert process.wait(10) != 0
    again = fabric.up("n3")
    assert again.address == machine.address
    assert "before" not in again.run("ls", "/tmp").stdout
    wait_until(lambda: _hears(pair[0], again), "the new machine")


def test_a_failed_command_is_an_error(pair: Pair) -> None:
    with pytest.raises(MachineError, match="n1: ls /absent: exit code 2"):
        pair[0].run("ls", "/absent")


HOLDER = """
import time
from tests.cluster.fabric import Fabric
fabric = Fabric()
print(fabric.up("n1").first, flush=True)
time.sleep(1000)
"""


def test_machines_die_with_the_process_that_started_them() -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert holder.stdout is not None
    first = int(holder.stdout.readline())
    unshared = children(holder.pid)
    assert len(unshared) == 2  # of the bridge and of the machine
    holder.kill()
    holder.communicate()
    for pid in [first, *unshared]:
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"the end of {pid}")
