"""The process that owns Ray's server processes: starts them, watches them, ends them.

``ray_session`` starts it as a program of its own, in a session of its own::

    driver --(stdin: open while the driver lives)--> keeper --> gcs_server, raylet --> workers
           <--(stdout: one report per line)---------

Why a process between the driver and Ray:

1. A signal to the driver's process group or a closed terminal reaches no process of Ray, so a
   training can write its checkpoint before Ray ends.
2. However the driver dies, the kernel closes its end of the pipe. The keeper then ends every
   process of its session and removes their files.
3. The driver learns of a lost server at once. Ray's own client would wait for a lost GCS for a
   minute and then end the driver without a message.

It imports nothing of this package: it runs before anything else is ready.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

# systemd and some schedulers send a signal to each process of a job. Ray's processes inherit that
# these are blocked: only the driver acts on a stop request. SIGKILL, which ends them, always works.
_BLOCKED = {
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
_SERVERS = ("gcs_server", "raylet")  # the session cannot continue without them


def main(directory: Path, cpus: int, gpus: int) -> NoReturn:
    """Start Ray in ``directory``, report, and keep watching until the driver closes the pipe."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    # Standard output is the pipe of the reports. What Ray prints goes to standard error, a file.
    reports = os.dup(1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_driver, args=(directory,), daemon=True).start()
    try:
        address, servers = _start_ray(directory, cpus, gpus)
    except Exception as error:  # whatever it is, the driver shows it to the user
        _report(reports, f"failed {' '.join(str(error).split())}")
    else:
        _report(reports, f"started {address}")
        lost, status = _wait_for_a_death(servers)
        _report(reports, f"lost {lost} {status}")
        # Training cannot continue. Whatever stays alive would only print misleading errors.
        _kill_session()
    while True:
        time.sleep(3600)  # until the other thread ends this process


def _start_ray(directory: Path, cpus: int, gpus: int) -> tuple[str, dict[str, int]]:
    """Start Ray's servers; returns the address of the GCS and the process ID of each server.

    ``ray.init(address="local")`` does the same. This keeps the servers without being a client of
    them, which a lost server would take along.
    """
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    node = Node(
        RayParams(
            num_cpus=cpus,
            num_gpus=gpus,
            include_dashboard=False,
            no_monitor=True,  # the autoscaler
            temp_dir=str(directory),
        ),
        head=True,
        shutdown_at_exit=False,
        spawn_reaper=True,  # the kernel ends the servers if this process is killed
        ray_init_cluster=True,
    )
    pids = {name: node.all_processes[name][0].process.pid for name in _SERVERS}
    return str(node.gcs_address), pids


def _wait_for_a_death(servers: dict[str, int]) -> tuple[str, int]:
    """Block until a server has died; returns its name and status: -9 after SIGKILL, else its code.

    Example: the out-of-memory killer of the kernel ends the raylet -> ("raylet", -9).
    """
    names = {os.pidfd_open(pid): name for name, pid in servers.items()}
    ready, _, _ = select.select(list(names), [], [])
    # The GCS first: a raylet that cannot reach it dies as well.
    name = next(name for name in servers if name in {names[fd] for fd in ready})
    _, status = os.waitpid(servers[name], 0)
    return name, os.waitstatus_to_exitcode(status)


def _end_with_driver(directory: Path) -> None:
    """Wait until the driver has closed the pipe; then leave no process and no file."""
    while os.read(0, 1):
        pass
    _kill_session()
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)  # the main thread may be anywhere in Ray's code


def _kill_session() -> None:
    """End every other process of this session; returns when none is left."""
    while members := _session_members():
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _session_members() -> list[int]:
    """Process IDs of this session except this process, oldest first; zombies are left out."""
    members = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has just ended
            # "123 (name, may contain spaces) S ppid pgrp session ..."
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == os.getpid() and fields[0] != "Z":
                members.append(int(folder.name))
    return sorted(members)


def _report(reports: int, line: str) -> None:
    with contextlib.suppress(OSError):  # the driver is gone: the other thread cleans up
        os.write(reports, f"{line}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
