"""The command doctor on three machines: each check fails once, on a machine that was prepared for
it, and names the machine, the cause and what to do.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from importlib import metadata
from pathlib import Path

import pytest

import pipeline
from tests.cluster.fabric import Fabric, FabricMachine
from tests.cluster.processes import wait_until
from tests.cluster.ray_machines import DIRECTORY, RayMachines

LONGEST_S = 3 * 15  # three times what a check of three machines may take
CLUSTER = "kind: ray\nnodes: 3\ndevice: cpu\nray: {{address: '{dashboard}'}}\n"
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
NAMES = ("n1", "n2", "n3")
INTERFACE = "eth1"


class Site:
    """Three machines with Ray; each has a second network interface, eth1."""

    def __init__(self, fabric: Fabric, folder: Path) -> None:
        self.fabric = fabric
        self.folder = folder
        self.share = folder / "share"  # holds the folder of the runs
        self.share.mkdir()
        self.ray = RayMachines(folder=folder)
        for number, name in enumerate(NAMES, 1):
            self._connect(fabric.up(name), number)
        self.ray.head(self["n1"], "--cpus", "1")
        for name in NAMES[1:]:
            self.ray.join(self[name], "--cpus", "1")
        self.cluster = folder / "site.yaml"
        self.cluster.write_text(CLUSTER.format(dashboard=self.ray.dashboard))

    def __getitem__(self, name: str) -> FabricMachine:
        return self.fabric[name]

    def _connect(self, machine: FabricMachine, number: int) -> None:
        self.fabric.ip_of_bridge(f"link add w{number} type veth peer name x{number}")
        self.fabric.ip_of_bridge(f"link set w{number} master br0 up")
        self.fabric.ip_of_bridge(f"link set x{number} netns {machine.first}")
        machine.run(*f"ip link set x{number} name {INTERFACE}".split())
        machine.run(*f"ip addr add 10.78.0.{number}/24 dev {INTERFACE}".split())
        machine.run(*f"ip link set {INTERFACE} up".split())

    def replace(self, name: str, path: Path, change: tuple[str, str]) -> None:
        """Give one machine another version of a file."""
        changed = self.folder / f"{name}-{path.name}"
        text = path.read_text()
        assert change[0] in text
        changed.write_text(text.replace(*change, 1))
        self[name].run("mount", "--bind", changed, path)

    def end_idle_workers(self, name: str) -> None:
        """Ray starts new processes on the machine, with the limits and libraries of now."""
        for pid in self[name].pids("ray::IDLE"):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self[name].pids("ray::IDLE"), "the end of idle workers")

    def doctor(self, *settings: str, code: int = 3) -> str:
        """The output of doctor, started on the first machine as on a cluster's own head."""
        began = time.monotonic()
        done = self["n1"].run(
            *["python", "-m", "pipeline", "doctor", "--on", str(self.cluster)],
            *["--run-dir", str(self.share / "runs"), "--set", "cluster.network.interface=eth1"],
            *(part for text in settings for part in ("--set", text)),
            environment={**self.ray.environment, "PIPELINE_RAY_ADDRESS": self.ray.gcs},
            check=False,
            timeout=300,
        )
        output = done.stdout + done.stderr
        assert done.returncode == code, output
        assert time.monotonic() - began < LONGEST_S
        assert not (self.share / "runs").exists()
        return output


@pytest.fixture(scope="module")
def site(fabric: Fabric, shared_folder: Path) -> Site:
    return Site(fabric, shared_folder)


def faults(output: str) -> list[str]:
    """The lines about machines that are not fit, without the time before them."""
    matches = (re.search(r"check ([a-z ]+: n\d) \(", line) for line in output.splitlines())
    return sorted(match[1] for match in matches if match)


def test_machines_that_are_fit_pass_every_check(site: Site) -> None:
    output = site.doctor(f"cluster.site_check={shutil.which('true')}", code=0)
    assert re.findall(r"check ([a-z ]+):", output) == [
        *("answer", "run directory", "data", "space", "versions", "code", "clock", "limits"),
        *("devices", "site check", "network"),
    ]
    assert re.search(r"check network: all-reduce at [\d,]+ MiB/s over eth1", output)
    assert f"torch {metadata.version('torch')}" in output


def test_files_memory_space_and_the_link_of_a_machine_are_judged(site: Site) -> None:
    second, third = site["n2"], site["n3"]
    # n2: little space, another checkout, a fault that only the site's own check sees.
    second.run(*f"mount -t tmpfs -o size=50m none {DIRECTORY}/tmp".split())
    module = Path(pipeline.__file__).with_name("suggest.py")
    site.replace("n2", module, ("from __future__", "# changed\nfrom __future__"))
    own_check = site.folder / "own_check.sh"
    own_check.write_text('#!/bin/sh\necho "GPU 3: row remapping failed"\ntest $(hostname) != n2\n')
    own_check.chmod(0o755)
    # n3: another version of a library, little shared memory, an unplugged cable.
    package = Path(str(metadata.distribution("numpy")._path)) / "METADATA"  # type: ignore[attr-defined]
    version = metadata.version("numpy")
    site.replace("n3", package, (f"\nVersion: {version}", "\nVersion: 1.0.0"))
    third.run("mount", "-o", "remount,size=40m", "/dev/shm")
    site.fabric.ip_of_bridge("link set w3 down")
    try:
        output = site.doctor(f"cluster.site_check={own_check}")
    finally:
        second.run("umount", "-l", DIRECTORY / "tmp")
        second.run("umount", "-l", module)
        third.run("umount", "-l", package)
        site.fabric.ip_of_bridge("link set w3 up")
        third.run("mount", "-o", "remount,size=1g", "/dev/shm")
    assert faults(output) == [
        *("code: n2", "limits: n3", "network: n3", "site check: n2", "space: n2", "versions: n3"),
    ]
    for cause in (
        "n2 (10.77.0.2): another version of suggest.py",
        "n2 (10.77.0.2): 0.0 GiB free in /tmp/ray/tmp, 1.0 GiB are needed",
        "exit code 1: GPU 3: row remapping failed",
        f"n3 (10.77.0.3): numpy 1.0.0 instead of {version}",
        "n3 (10.77.0.3): /dev/shm has 40 MiB, 64 are needed",
        "n3 (10.77.0.3): no connection with the other machines over eth1",
        "not fit: n2 (10.77.0.2), n3 (10.77.0.3)",
    ):
        assert cause in output
    assert output.count("  -> ") == 7  # of each check, and of the command


def test_clock_limits_and_missing_folders_are_judged(site: Site) -> None:
    if not FAKETIME.exists():
        subprocess.run(["apt-get", "install", "-y", "-qq", "faketime"], check=True)
    second, third = site["n2"], site["n3"]
    second.hide(site.share)
    second.run("ip", "link", "del", "eth1")
    # Every program that starts on n3 from now on sees a clock that is a minute ahead.
    third.run("cp", "-a", "/etc", "/tmp/etc")
    third.run("bash", "-c", f"echo {FAKETIME} > /tmp/etc/ld.so.preload")
    third.run("bash", "-c", "echo +60 > /tmp/etc/faketimerc")
    third.run("mount", "--bind", "/tmp/etc", "/etc")
    for pid in third.pids("raylet"):
        subprocess.run(["prlimit", "--pid", str(pid), "--nofile=1024:1024"], check=True)
    site.end_idle_workers("n3")
    output = site.doctor()
    assert faults(output) == ["clock: n3", "limits: n3", "network: n2", "run directory: n2"]
    for cause in (
        f"n2 (10.77.0.2): {site.share}/runs is another folder than the driver's",
        "n2 (10.77.0.2): has no interface eth1",
        "n3 (10.77.0.3): its clock is 60 s ahead",
        "n3 (10.77.0.3): 1024 open files are allowed, 4096 are needed",
    ):
        assert cause in output
