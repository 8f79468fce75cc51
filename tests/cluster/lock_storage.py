"""Shared folders with the locks that real file systems have: FUSE mounts on machines of the tests.

own            flock is kept on each machine for itself (BeeGFS, Lustre with -o localflock)
forwarded      flock is that of the folder below, for all machines (NFSv4)
refused        flock says that it is not there (Lustre without -o flock)
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Literal

from tests.cluster.fabric import FabricMachine, MachineProcess

Locks = Literal["own", "forwarded", "refused"]

# A driver, as far as the lock is concerned: "held", then until it is killed or the file appears.
HOLDER = """
import sys, time
from pathlib import Path
from pipeline.errors import PipelineError
from pipeline.layout import RunDir
from pipeline.orchestrate.run_lock import run_lock

run_dir = RunDir(Path(sys.argv[1]))
try:
    with run_lock(run_dir):
        print("held", flush=True)
        while not (run_dir.path / "end").exists():
            time.sleep(0.1)
except PipelineError as error:
    print(error.message)
    sys.exit(error.exit_code)
"""
_NO_FLOCK = """
#include <errno.h>
int flock(int descriptor, int operation) { errno = ENOSYS; return -1; }
"""


def install() -> None:
    """Install bindfs (Debian) if it is missing."""
    if shutil.which("bindfs") is None:
        subprocess.run(["apt-get", "install", "-y", "-qq", "bindfs"], check=True)


def mount(machine: FabricMachine, folder: Path, at: Path, locks: Locks) -> None:
    """Mount ``folder`` at ``at``, on this machine only."""
    options = ["--enable-lock-forwarding", "--multithreaded"] if locks == "forwarded" else []
    machine.run("bindfs", *options, folder, at)


def library_without_flock(folder: Path) -> Path:
    """A library to preload, with which flock() is not supported.

    A FUSE file system cannot refuse flock: the kernel then keeps the lock itself.
    """
    source = folder / "noflock.c"
    library = folder / "noflock.so"
    source.write_text(_NO_FLOCK)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def start_driver(
    machine: FabricMachine, run_dir: Path, log: Path, environment: dict[str, str] | None = None
) -> MachineProcess:
    """Start a process that takes the lock of the run and keeps it."""
    with open(log, "w") as file:
        return machine.popen("python", "-c", HOLDER, run_dir, environment=environment, output=file)
