"""One driver per run, on shared storage with every kind of file lock, and after lost machines."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.orchestrate import run_lock
from tests.cluster import lock_storage
from tests.cluster.fabric import Fabric, FabricMachine, MachineProcess
from tests.cluster.processes import wait_until

TAKEOVER_S = 3 * (run_lock.LEASE_S + 10)
JOB = {"SLURM_JOB_ID": "4711"}
REQUEUED = JOB | {"SLURM_RESTART_COUNT": "1"}


@dataclass(kw_only=True)
class Storage:
    """Shared folders on two machines: ``below`` is the real one, the others are mounts of it."""

    fabric: Fabric
    below: Path
    own: Path
    forwarded: Path
    no_flock: Path  # a library

    @property
    def machines(self) -> tuple[FabricMachine, FabricMachine]:
        return self.fabric["n1"], self.fabric["n2"]

    def up(self, name: str) -> FabricMachine:
        machine = self.fabric.up(name)
        lock_storage.mount(machine, self.below, self.own, "own")
        lock_storage.mount(machine, self.below, self.forwarded, "forwarded")
        return machine

    def end(self, run_dir: Path) -> None:
        """Let the drivers of a run end."""
        (self.below / run_dir.name / "end").touch()

    def log(self, name: str) -> Path:
        return self.below.parent / f"{name}.log"


@pytest.fixture(scope="module")
def storage(fabric: Fabric, shared_folder: Path) -> Iterator[Storage]:
    lock_storage.install()
    folders = [shared_folder / name for name in ("below", "own", "forwarded")]
    for folder in folders:
        folder.mkdir()
    library = lock_storage.library_without_flock(shared_folder)
    storage = Storage(
        fabric=fabric,
        below=folders[0],
        own=folders[1],
        forwarded=folders[2],
        no_flock=library,
    )
    storage.up("n1")
    storage.up("n2")
    yield storage


def start(
    storage: Storage,
    machine: FabricMachine,
    run_dir: Path,
    name: str,
    environment: dict[str, str] | None = None,
) -> MachineProcess:
    return lock_storage.start_driver(machine, run_dir, storage.log(name), environment)


def wait_for(storage: Storage, name: str, text: str, seconds: float = 60) -> None:
    path = storage.log(name)
    wait_until(lambda: text in path.read_text(), f"{text}: {path.read_text()}", seconds)


def refused(storage: Storage, process: MachineProcess, name: str) -> str:
    """The message of a driver that is refused with exit code 2."""
    assert process.wait(60) == 2, storage.log(name).read_text()
    return storage.log(name).read_text()


@pytest.mark.parametrize("locks", ["own", "forwarded", "refused"])
def test_a_second_driver_is_refused_and_host_and_job_are_named(
    storage: Storage, locks: str
) -> None:
    first, second = storage.machines
    folder = storage.forwarded if locks == "forwarded" else storage.own
    added = {"LD_PRELOAD": str(storage.no_flock)} if locks == "refused" else {}
    run_dir = folder / f"second-{locks}"
    holder = start(storage, first, run_dir, "holder", JOB | added)
    wait_for(storage, "holder", "held")
    there = start(storage, second, run_dir, "there", added)
    here = start(storage, first, run_dir, "here", added)
    for process, name in ((there, "there"), (here, "here")):
        message = refused(storage, process, name)
        assert " on n1 (job 4711) is working on this run" in message
        assert "stop job 4711" in message
    storage.end(run_dir)
    assert holder.wait(60) == 0
    # Given back: no wait, on any machine.
    began = time.monotonic()
    again = start(storage, second, run_dir, "again", added)
    assert again.wait(60) == 0
    assert storage.log("again").read_text() == "held\n"
    assert time.monotonic() - began < run_lock.LEASE_S


def test_two_drivers_that_start_together_do_not_both_run(storage: Storage) -> None:
    run_dir = storage.own / "together"
    processes = [start(storage, machine, run_dir, machine.name) for machine in storage.machines]
    logs = [storage.log(machine.name) for machine in storage.machines]
    wait_until(
        lambda: sorted(process.poll() is None for process in processes) == [False, True],
        "one to be refused",
        60,
    )
    assert sorted("held" in log.read_text() for log in logs) == [False, True]
    storage.end(run_dir)
    for process in processes:
        process.wait(60)


def test_the_run_of_a_machine_that_is_gone_is_taken_over(storage: Storage) -> None:
    """Three runs of one lost machine: each kind of lock; a requeued driver, and a new one."""
    storage.up("n3")
    lost = storage.fabric["n3"]
    _, second = storage.machines
    added = {"LD_PRELOAD": str(storage.no_flock)}
    runs = {
        "local": (storage.own / "lost-local", REQUEUED),
        "refused": (storage.own / "lost-refused", REQUEUED | added),
        "held": (storage.forwarded / "lost-held", {}),
    }
    for name, (run_dir, environment) in runs.items():
        start(
            storage, lost, run_dir, f"lost-{name}", JOB | environment | {"SLURM_RESTART_COUNT": "0"}
        )
    for name in runs:
        wait_for(storage, f"lost-{name}", "held")
    lost.lose()
    # NFSv4 keeps the lock of a machine that is gone until its lease ends: this file stands for it.
    with open(storage.below / "lost-held" / ".lock") as stale:
        fcntl.flock(stale, fcntl.LOCK_EX)
        began = time.monotonic()
        drivers = [
            start(storage, second, run_dir, f"new-{name}", environment)
            for name, (run_dir, environment) in runs.items()
        ]
        for name in runs:
            wait_for(storage, f"new-{name}", "\nheld", TAKEOVER_S)
            assert (
                " on n3 (job 4711) still works on this run"
                in storage.log(f"new-{name}").read_text()
            )
        assert time.monotonic() - began > run_lock.LEASE_S / 2
        # The lock of "held" is not theirs, but nobody else gets in.
        first, _ = storage.machines
        late = start(storage, first, runs["held"][0], "late")
        assert " on n2 is working on this run" in refused(storage, late, "late")
    for driver in drivers:
        driver.kill()


def test_a_driver_that_was_replaced_ends(storage: Storage) -> None:
    """It was frozen for so long that another one has taken its run over."""
    first, second = storage.machines
    run_dir = storage.own / "frozen"
    frozen = start(storage, first, run_dir, "frozen")
    wait_for(storage, "frozen", "held")
    frozen.send_signal(signal.SIGSTOP)
    new = start(storage, second, run_dir, "thawed")
    wait_for(storage, "thawed", "\nheld", TAKEOVER_S)
    frozen.send_signal(signal.SIGCONT)
    os.kill(frozen.pid, signal.SIGCONT)  # nsenter stops with its child
    frozen.wait(60)
    assert " on n2 has taken this run over: ending" in storage.log("frozen").read_text()
    assert new.poll() is None
    new.kill()


def test_a_requeued_driver_waits_for_one_that_still_ends(storage: Storage) -> None:
    """On one machine and a local disk: Slurm requeues before the old driver has ended."""
    first, _ = storage.machines
    run_dir = storage.below / "ending"
    old = start(storage, first, run_dir, "old", JOB)
    wait_for(storage, "old", "held")
    new = start(storage, first, run_dir, "new", REQUEUED)
    other = start(storage, first, run_dir, "other", {"SLURM_JOB_ID": "4712"})
    refused(storage, other, "other")
    assert new.poll() is None
    old.kill()
    wait_for(storage, "new", "held")
    new.kill()
