"""What the machines of a test show: listening sockets, and where a secret can be read."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.cluster.fabric import FabricMachine

_LISTEN = "0A"  # state of a socket in /proc/net/tcp


def listening(machine: FabricMachine) -> set[str]:
    """Addresses that sockets of the machine listen at: "127.0.0.1:8265"."""
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in machine.run("cat", f"/proc/net/{table}").stdout.splitlines()[1:]:
            words = line.split()
            if words[3] == _LISTEN:
                host, port = words[1].split(":")
                addresses.add(f"{_address(host)}:{int(port, 16)}")
    return addresses


def _address(digits: str) -> str:
    """The kernel writes addresses as words of 32 bits in the order of the machine."""
    words = [int(digits[i : i + 8], 16) for i in range(0, len(digits), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, packed)


def beyond_loopback(machine: FabricMachine) -> set[str]:
    """Listening addresses that other machines can reach."""
    return {at for at in listening(machine) if not at.startswith(("127.", "::1:", "::ffff:127."))}


def places_of(
    secret: bytes,
    machines: Iterable[FabricMachine],
    folders: Iterable[Path],
    allowed: Iterable[Path] = (),
) -> list[str]:
    """Files, argument lists and environments that hold a secret.

    Args:
        folders: on file systems that all machines share; each machine's own /tmp is searched too.
        allowed: files that may hold it.
    """
    places = [str(path) for folder in folders for path in _holding(secret, folder, allowed)]
    for machine in machines:
        own = Path(f"/proc/{machine.first}/root/tmp")
        places += [f"{machine.name}: {path}" for path in _holding(secret, own, allowed)]
        for pid in machine.pids():
            for kind in ("cmdline", "environ"):
                with contextlib.suppress(OSError):  # it has just ended
                    if secret in Path(f"/proc/{pid}/{kind}").read_bytes():
                        places.append(f"{machine.name}: {kind} of {pid}")
    return places


def _holding(secret: bytes, folder: Path, allowed: Iterable[Path]) -> Iterator[Path]:
    known = {path.stat().st_ino for path in allowed}
    device = folder.stat().st_dev
    for parent, folders, names in os.walk(folder):
        # What is mounted below is not this machine's own.
        folders[:] = [name for name in folders if os.lstat(f"{parent}/{name}").st_dev == device]
        for path in (Path(parent, name) for name in names):
            with contextlib.suppress(OSError):
                entry = path.lstat()
                is_searched = stat.S_ISREG(entry.st_mode) and entry.st_ino not in known
                if is_searched and secret in path.read_bytes():
                    yield path
