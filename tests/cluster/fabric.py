"""Several machines on one host, for tests: a machine is a set of Linux namespaces.

Each has its own network interface (eth0, on a bridge that only the machines see), processes, host
name, /tmp, /dev/shm and /etc/hosts. Everything else is the host's: a folder that is not below /tmp,
or that is among ``shared``, is a file system that all machines share.

    with Fabric(shared=[folder]) as fabric:
        first, second = fabric.up("n1"), fabric.up("n2")
        first.run("ip", "addr")
        process = second.popen("sleep", "100")
        second.cut()  # a lost link: nothing answers, nothing is refused
        second.mend()
        second.kill()  # all its processes, at once
        second = fabric.up("n2")  # it boots: an empty /tmp

All machines end when the test process ends, however it does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from tests.cluster.processes import all_pids, children, command_line, namespace_of, wait_until

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
_INIT = Path(__file__).with_name("machine_init.py")
_NAMESPACES = ("-n", "-m", "-p", "-u", "-i")  # network, mounts, processes, host name, IPC
# The kernel sends the signal when the thread that has started the command ends.
_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")


class MachineError(Exception):
    """A machine could not be set up, or a command on it failed."""


class MachineProcess(subprocess.Popen[str]):
    """A process on a machine. Signals reach the process itself, not ``nsenter``, its parent."""

    def send_signal(self, sig: int) -> None:
        """Send a signal to the process on the machine."""
        for pid in children(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sig)


@dataclass(kw_only=True)
class FabricMachine:
    """A machine that is up, until ``kill``."""

    name: str
    number: int
    fabric: Fabric
    unshare: subprocess.Popen[bytes]  # its child is the first process of the machine
    first: int  # process ID of that child

    @property
    def address(self) -> str:
        return address(self.number)

    def command(self, *arguments: str | Path) -> list[str]:
        """The command line, for the host, of a command on this machine."""
        inside = ["nsenter", "-t", str(self.first), *_NAMESPACES, "--"]
        return [*inside, *map(str, arguments)]

    def run(
        self,
        *arguments: str | Path,
        timeout: float = 60,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end.

        Raises:
            MachineError: it failed, and ``check`` is true.
        """
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            cwd="/",
            env=environment_of_machine(environment),
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode != 0:
            shown = " ".join(map(str, arguments))
            raise MachineError(
                f"{self.name}: {shown}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def popen(
        self,
        *arguments: str | Path,
        environment: Mapping[str, str] | None = None,
        output: IO[str] | int | None = None,
    ) -> MachineProcess:
        """Start a command; standard output and standard error go to ``output``."""
        return MachineProcess(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
            env=environment_of_machine(environment),
            start_new_session=True,
        )

    def pids(self, pattern: str = "") -> list[int]:
        """Processes whose command lines contain ``pattern``, by their IDs on the host.

        ``os.kill`` takes these IDs. The first process of the machine is left out.
        """
        return [
            pid
            for pid in all_pids()
            if pid != self.first
            and namespace_of(pid) == namespace_of(self.first)
            and pattern in command_line(pid)
        ]

    def kill(self) -> None:
        """End every process of the machine at once. The kernel still resets its connections."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.first, signal.SIGKILL)
        # nsenter stops together with its command. The machine ends when each has been collected.
        for pid in all_pids():
            if command_line(pid).startswith(f"nsenter -t {self.first} "):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        self.unshare.wait()  # until the kernel has ended all the others
        self.fabric.forget(self)

    def cut(self) -> None:
        """Unplug the network: packets vanish in both directions."""
        self.fabric.ip_of_bridge(f"link set v{self.number} down")

    def mend(self) -> None:
        """Plug the network in again."""
        self.fabric.ip_of_bridge(f"link set v{self.number} up")

    def lose(self) -> None:
        """A power loss: first the link, so that nobody is notified, then every process."""
        self.cut()
        self.kill()

    def hide(self, folder: Path) -> None:
        """Mount an empty file system over a folder, on this machine only."""
        self.run("mount", "-t", "tmpfs", "none", folder)

    def show(self, folder: Path) -> None:
        """Undo ``hide``. Processes keep what they have open."""
        self.run("umount", "-l", folder)


class Fabric:
    """The network of the machines, and the machines that are up.

    Args:
        shared: folders below /tmp that all machines see, besides the checkout and Python's.
    """

    def __init__(self, shared: Sequence[Path] = ()) -> None:
        python = [Path(sys.prefix), Path(sys.executable).resolve().parents[1]]
        seen = {path.resolve() for path in [ROOT, *python, *shared]}
        self._binds = sorted(path for path in seen if path.is_relative_to("/tmp"))
        self._numbers: dict[str, int] = {}  # also of machines that are gone: they may come back
        self.machines: dict[str, FabricMachine] = {}
        self._bridge = _unshare("-n", command=["sleep", "infinity"])
        self.ip_of_bridge("link set lo up")
        self.ip_of_bridge("link add br0 type bridge")
        self.ip_of_bridge("link set br0 up")

    def __enter__(self) -> Fabric:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    def up(self, name: str) -> FabricMachine:
        """Start a machine; at its first start it gets the next address."""
        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        command = [sys.executable, "-S", str(_INIT)]
        unshare = _unshare(*_NAMESPACES, "--mount-proc", command=command)
        first = _child(unshare)
        machine = FabricMachine(name=name, number=number, fabric=self, unshare=unshare, first=first)
        self.machines[name] = machine
        self._connect(machine)
        machine.run("bash", "-ec", self._set_up(machine))
        self._name_all()
        return machine

    def __getitem__(self, name: str) -> FabricMachine:
        return self.machines[name]

    def down(self) -> None:
        """End all machines and their network."""
        for machine in list(self.machines.values()):
            machine.kill()
        self._bridge.kill()
        self._bridge.wait()

    def forget(self, machine: FabricMachine) -> None:
        """Called by a machine that has ended."""
        if self.machines.get(machine.name) is machine:
            del self.machines[machine.name]

    def ip_of_bridge(self, arguments: str) -> None:
        """Run ``ip`` in the network namespace of the bridge. Example: "link set v1 down"."""
        inside = ["nsenter", "-t", str(_child(self._bridge)), "-n", "--"]
        command = [*inside, "ip", *arguments.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise MachineError(f"ip {arguments}: {done.stderr.strip()}")

    def _connect(self, machine: FabricMachine) -> None:
        """A cable: v<N> on the bridge, and eth0 in the machine."""
        cable = f"v{machine.number}"
        with contextlib.suppress(MachineError):  # of a machine that has just ended
            self.ip_of_bridge(f"link del {cable}")
        end = f"e{machine.number}"
        self.ip_of_bridge(f"link add {cable} type veth peer name {end}")
        self.ip_of_bridge(f"link set {cable} master br0 up")
        self.ip_of_bridge(f"link set {end} netns {machine.first}")
        machine.run(*f"ip link set {end} name eth0".split())

    def _set_up(self, machine: FabricMachine) -> str:
        """Shell lines that run on the machine when it boots."""
        binds = [
            f"mkdir -p /mnt/tmp{str(path).removeprefix('/tmp')}\n"
            f"mount --bind {path} /mnt/tmp{str(path).removeprefix('/tmp')}"
            for path in self._binds
        ]
        return "\n".join(
            [
                f"hostname {machine.name}",
                "ip link set lo up",
                f"ip addr add {machine.address}/24 dev eth0",
                "ip link set eth0 up",
                "mkdir -p /mnt/tmp",
                "mount -t tmpfs none /mnt/tmp",
                *binds,
                "chmod 1777 /mnt/tmp",
                "mount --move /mnt/tmp /tmp",
                "mkdir /tmp/home",
                "touch /tmp/hosts",
                "mount --bind /tmp/hosts /etc/hosts",
                "mount -t tmpfs -o mode=1777 none /dev/shm",
            ]
        )

    def _name_all(self) -> None:
        """Every machine knows the name of every other one."""
        names = [f"{address(number)} {name}" for name, number in self._numbers.items()]
        lines = "\n".join(["127.0.0.1 localhost", *names])
        for machine in self.machines.values():
            machine.run("bash", "-c", 'echo "$0" > /tmp/hosts', lines)


def address(number: int) -> str:
    """The address of a machine."""
    return f"{NETWORK}.{number}"


def one_core(number: int) -> list[str]:
    """What to write before a command so that its machine seems to have one core of the host."""
    cores = sorted(os.sched_getaffinity(0))
    return ["taskset", "--cpu-list", str(cores[number % len(cores)])]


def environment_of_machine(added: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of a command: this checkout's Python, a home folder of the machine's own."""
    # TORCHINDUCTOR_: tests that compile have set it; a machine's cache is where TMPDIR says.
    left_out = ("RAY_", "PYTEST_", "SLURM", "PIPELINE_", "TORCHINDUCTOR_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(left_out) and name not in ("TMPDIR", "XDG_RUNTIME_DIR")
    }
    folder = Path(sys.executable).parent
    return kept | {
        "HOME": "/tmp/home",
        "PATH": f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        **(added or {}),
    }


def _unshare(*namespaces: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command in namespaces of its own, as the child of the returned process."""
    return subprocess.Popen(
        [*_WITH_PARENT, "unshare", *namespaces, "--fork", "--kill-child", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, []),
    )


def _child(process: subprocess.Popen[bytes]) -> int:
    wait_until(lambda: children(process.pid) or process.poll() is not None, "unshare")
    if process.poll() is not None:
        assert process.stderr is not None
        raise MachineError(f"namespaces: {process.stderr.read().decode().strip()}")
    return children(process.pid)[0]
