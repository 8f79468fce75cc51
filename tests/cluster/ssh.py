"""A real SSH server on machines of the tests, for one key (Debian's, installed if missing)."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.cluster import debian
from tests.cluster.fabric import FabricMachine

_SERVER = """
ListenAddress {address}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
"""
_CLIENT = """
User root
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


def start_ssh(machines: list[FabricMachine], folder: Path) -> list[str]:
    """Start a server on each machine; returns the command of a client, without the host.

    ``folder``: seen by all of them.
    """
    debian.install(["/usr/sbin/sshd", "ssh-keygen"], ["openssh-server"])
    folder.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-N", "", "-f", str(folder / "key")], check=True)
    (folder / "client").write_text(_CLIENT.format(folder=folder))
    Path("/run/sshd").mkdir(exist_ok=True)
    for machine in machines:
        configuration = folder / f"server-{machine.name}"
        configuration.write_text(_SERVER.format(folder=folder, address=machine.address))
        machine.run("/usr/sbin/sshd", "-f", configuration)
    return ["ssh", "-F", str(folder / "client")]
