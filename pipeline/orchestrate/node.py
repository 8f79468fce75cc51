"""Starts Ray on one machine of a cluster, and ends it so that nothing of it is left.

``pipeline node head`` starts the head, ``pipeline node join ADDRESS`` another machine. Schedulers
send SIGTERM to *every* process of a job before they take a machine away, and Ray's own processes
would end at once, before the ranks have saved. Therefore:

1. All stop signals are blocked here. Children inherit that, so ``ray start --block`` and everything
   below it never sees them, and this process reads them one by one.
2. On the first one, a machine that has joined is drained: the driver sees within a second that it
   leaves, saves the current step and ends the ranks here. Then the raylet ends by itself. A head
   passes the signal on to the drivers on its machine and waits for their end instead: they need its
   raylet until then.
3. SIGUSR2 skips that: a script sends it when its driver has ended.
4. When the raylet or the head is gone, or the grace is over, every process that is left is killed,
   and the directory is removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.config import machine
from pipeline.errors import ConfigError, StageError
from pipeline.files import write_json
from pipeline.orchestrate.descendants import (
    adopt_orphans,
    descendants,
    is_alive,
    kill_descendants,
    reap,
)
from pipeline.orchestrate.ports import free_port
from pipeline.orchestrate.ray_session import LONGEST_PATH
from pipeline.runtime import environment

ADDRESSES = "address.json"  # in the directory of a head, once it is up

_WRITTEN_BY_RAY = "ray_current_cluster"  # when Ray is up: the address of the control process
_AT_ONCE = signal.SIGUSR2  # for scripts: nobody needs Ray any more
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, _AT_ONCE)
_SERVERS = {"raylet", "gcs_server"}  # names of the processes without which Ray is lost
_POLL_S = 0.1
_DEFAULT_DASHBOARD = 8265  # as `ray start` has it
# Ray takes ports of this range for its workers: a port that is free now may be taken later.
_PORTS_OF_WORKERS = range(10002, 20000)
_OBJECT_STORE = 200_000_000  # bytes; only results of preparation tasks pass through it
_KNOCK_S = 1.0  # between looks whether the head is there
_KNOCKS = 3  # refused in a row: it has ended
_SHOWN_LINES = 15  # of Ray's output, when it does not start


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """What Ray is started with.

    Attributes:
        directory: for everything that Ray and its processes write; removed at the end.
        gcs: address of the head ("10.0.0.1:6379"); empty: this machine is the head.
        cpus, gpus: what Ray may assign; None: what the machine has.
        grace: longest time between a stop signal and the end (seconds).
        address: IP of this machine as the others reach it; empty: that of its host name.
        port: of a head, for the other machines; 0: any free one.
        dashboard: whether a head offers the API for Ray jobs.
    """

    directory: Path
    gcs: str = ""
    cpus: int | None = None
    gpus: int | None = None
    grace: float = 120.0
    address: str = ""
    port: int = 0
    dashboard: bool = True


def run_node(options: NodeOptions) -> None:
    """Run Ray on this machine until a stop signal, or until Ray ends.

    Raises:
        ConfigError: the directory cannot be used.
        StageError: Ray does not start, or one of its servers died.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    adopt_orphans()
    _make_directory(options.directory)
    try:
        _Node(options).run()
    finally:
        kill_descendants()
        shutil.rmtree(options.directory, ignore_errors=True)


class _Node:
    """``ray start --block`` and the processes below it."""

    def __init__(self, options: NodeOptions) -> None:
        self._options = options
        self._address = options.address or _own_address()
        self._output = options.directory / "start.log"
        self._dashboard = 0  # its port; 0: none
        if options.dashboard and not options.gcs:
            self._dashboard = _port_of_server(self._address, _DEFAULT_DASHBOARD)
        self._starter: psutil.Process | None = None
        self._servers: list[psutil.Process] = []  # once Ray is up
        self._refused = 0  # knocks in a row
        self._knocked = 0.0

    def run(self) -> None:
        """Start Ray, and wait for its end or for that of the grace after a stop signal.

        Raises:
            StageError: Ray ended without a stop signal.
        """
        self._starter = self._start()
        deadline: float | None = None
        needed: list[psutil.Process] = [self._starter]  # the end of one is the end of all
        while deadline is None or time.monotonic() < deadline:
            number = signal.sigtimedwait(_SIGNALS, _POLL_S)
            reap()
            if number is not None and (number.si_signo == _AT_ONCE or not self._servers):
                return
            if number is not None and deadline is None:
                print("Ray on this machine is asked to leave", flush=True)
                deadline = time.monotonic() + self._options.grace
                leaving = self._leave()
                if not self._options.gcs:  # without drivers, nobody needs the head
                    needed.append(leaving)
            # Checked before the head: of a machine that leaves, the raylet ends first.
            if not all(map(is_alive, needed)):
                if deadline is None:
                    raise self._lost()
                return
            if self._head_is_gone():
                return
            if not self._servers and self._gcs_address():
                self._servers = [process for process in descendants() if _is_server(process)]
                needed += self._servers
                self._announce()

    def _start(self) -> psutil.Process:
        temporary = self._options.directory / "tmp"
        temporary.mkdir()
        # Training and preparation leave files in TMPDIR: they are removed with the directory.
        variables = environment.ray_node(self._options.grace) | {"TMPDIR": str(temporary)}
        # -P: a ray.py in the working directory is not Ray.
        command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", *self._arguments()]
        with open(self._output, "wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | variables,
                start_new_session=True,
            )
        return psutil.Process(process.pid)

    def _arguments(self) -> list[str]:
        """Arguments of ``ray start``."""
        options = self._options
        cpus = machine.cores() if options.cpus is None else options.cpus
        arguments = [
            "--block",
            "--disable-usage-stats",
            f"--temp-dir={options.directory}",
            f"--num-cpus={cpus}",
            f"--object-store-memory={_OBJECT_STORE}",
            # 0: any free port, or none. Fixed ones would keep a second job off the machine.
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--dashboard-agent-listen-port=0",
            # It sends the output of processes to drivers. Ours write into the run directory.
            "--include-log-monitor=false",
        ]
        if self._address:
            arguments.append(f"--node-ip-address={self._address}")
        if options.gpus is not None:
            arguments.append(f"--num-gpus={options.gpus}")
        if options.gcs:
            return [*arguments, f"--address={options.gcs}"]
        arguments += ["--head", f"--port={options.port}"]
        # Nothing here uses this server, but it starts wherever grpcio is installed.
        arguments.append(f"--ray-client-server-port={_port_of_server(self._address)}")
        arguments += [f"--include-dashboard={bool(self._dashboard)}"]
        if self._dashboard:
            host = self._address or "0.0.0.0"
            arguments += [f"--dashboard-host={host}", f"--dashboard-port={self._dashboard}"]
        return arguments

    def _gcs_address(self) -> str:
        """The address of the head's control process; "" until Ray is up on this machine."""
        with contextlib.suppress(FileNotFoundError):
            return (self._options.directory / _WRITTEN_BY_RAY).read_text().strip()
        return ""

    def _announce(self) -> None:
        gcs = self._gcs_address()
        print(f"Ray is up on {self._address or socket.gethostname()}, head at {gcs}", flush=True)
        if not self._options.gcs:
            host = gcs.rpartition(":")[0]
            dashboard = f"http://{host}:{self._dashboard}" if self._dashboard else ""
            addresses = {"gcs": gcs, "dashboard": dashboard}
            write_json(self._options.directory / ADDRESSES, addresses)

    def _leave(self) -> psutil.Process:
        """Start what answers a stop signal."""
        action = "drain" if self._options.gcs else "drivers"
        arguments = [action, self._gcs_address(), _node_id(self._servers)]
        program = [sys.executable, "-P", str(Path(__file__).with_name("node_leave.py"))]
        process = subprocess.Popen(
            [*program, *arguments, str(self._options.grace)], stdin=subprocess.DEVNULL
        )
        return psutil.Process(process.pid)

    def _head_is_gone(self) -> bool:
        """True if the machine of the head answers, but nothing listens there any more.

        Ray itself notices after a minute. A machine that does not answer may come back.

        Raises:
            StageError: Ray has not come up here yet.
        """
        if not self._options.gcs or time.monotonic() - self._knocked < _KNOCK_S:
            return False
        host, _, port = self._options.gcs.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()
            self._refused = 0
        except ConnectionRefusedError:
            self._refused += 1
        except OSError:
            self._refused = 0
        self._knocked = time.monotonic()
        if self._refused < _KNOCKS:
            return False
        if not self._servers:
            raise self._no_head()
        print("the head has ended", flush=True)
        return True

    def _no_head(self) -> StageError:
        return StageError(
            "nothing listens at the address of the head",
            place=self._options.gcs,
            remedy="start the head first; its file address.json holds the address",
        )

    def _lost(self) -> StageError:
        """Ray has ended, and nobody asked for it."""
        lines = self._output.read_text(errors="replace").splitlines()
        shown = [line for line in lines if line.strip()][-_SHOWN_LINES:]
        event = "ended" if self._servers else "does not start"
        return StageError(
            "\n  ".join([f"Ray {event} on this machine. Its last lines:", *shown]),
            place=socket.gethostname(),
            remedy="look for memory, disk space and the head's address in these lines",
        )


def _node_id(servers: list[psutil.Process]) -> str:
    """Ray's ID of this machine: an argument of its raylet."""
    arguments: list[str] = next(server.cmdline() for server in servers if server.name() == "raylet")
    return next(text.partition("=")[2] for text in arguments if text.startswith("--node_id="))


def _own_address() -> str:
    """The IP of this machine's name, unless that is a loopback address: then Ray chooses."""
    # Ray would ask the route to the internet, which a machine of a cluster may not have.
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""
    return "" if address.startswith("127.") else address


def _port_of_server(address: str, preferred: int = 0) -> int:
    """A free port of this machine: the preferred one if possible."""
    for port in (preferred, *[0] * 100):
        with contextlib.suppress(OSError):
            free = free_port(address, port)
            if free not in _PORTS_OF_WORKERS:
                return free
    raise StageError("no port is free", place=address)


def _make_directory(directory: Path) -> None:
    """Create the directory, for this user only; an empty one that exists is used."""
    if len(os.fsencode(directory)) > LONGEST_PATH:
        raise ConfigError(
            f"the path is too long for Ray's sockets: more than {LONGEST_PATH} bytes",
            place=str(directory),
            remedy="choose another one, such as /tmp/ray-1",
        )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        usable = not any(directory.iterdir()) and directory.stat().st_uid == os.getuid()
    except OSError as error:
        raise ConfigError(f"cannot be created ({error.strerror})", place=str(directory)) from None
    if not usable:
        raise ConfigError(
            "is not an empty directory of this user; it would be removed at the end",
            place=str(directory),
            remedy="remove it, or choose another one",
        )


def _is_server(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return str(process.name()) in _SERVERS
    return False
