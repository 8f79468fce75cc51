"""Containers of an image on machines of the tests, with what a container runtime would take away.

The root is read-only, the user is the image's, no capability is left and none can be gained,
/dev/shm has 64 MiB, and /tmp is a file system in memory.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.cluster.fabric import FabricMachine, MachineProcess
from tests.cluster.image_build import BuiltImage

SHARED_MEMORY = "64m"  # what Docker gives
# The quickstart in little time: all stages, a few steps each.
SHORT = [
    word
    for setting in (
        "data.toy22k.synthetic.images_per_class=12",
        "data.toy1k.synthetic.images_per_class=12",
        "stages.pretrain.epochs=2",
        "stages.finetune.epochs=2",
    )
    for word in ("--set", setting)
]
_ROOT = "/mnt"  # where a machine has the container's files
_DEVICES = ("null", "zero", "full", "random", "urandom")


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A folder of the host in a container."""

    folder: Path
    target: str
    read_only: bool = False


@dataclass(kw_only=True)
class Container:
    """The only container of a machine. Its processes see those of the whole machine."""

    machine: FabricMachine
    image: BuiltImage
    volumes: Sequence[Volume] = ()
    temporary: str = "exec,mode=1777"  # options of /tmp
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.machine.run("bash", "-ec", "\n".join(self._set_up()))

    def run(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; its exit code may be any."""
        return self.machine.run(*self._command(words), timeout=timeout, check=False)

    def popen(self, *words: str, output: IO[str] | int | None = None) -> MachineProcess:
        """Start a command."""
        return self.machine.popen(*self._command(words), output=output)

    def _command(self, words: Sequence[str]) -> list[str]:
        user = self.image.user
        limits = ["--reuid", user, "--regid", user, "--clear-groups", "--no-new-privs"]
        limits += ["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
        variables = {"HOME": self.image.folder, **self.image.environment, **self.environment}
        return [
            *("chroot", _ROOT, "setpriv", *limits),
            *("env", "-i", "-C", self.image.folder),
            *(f"{name}={value}" for name, value in variables.items()),
            *words,
        ]

    def _set_up(self) -> list[str]:
        """Shell lines that give the machine the root of the container."""
        tmpfs = "mount -t tmpfs -o nosuid"
        lines = [
            f"mount --bind {self.image.root} {_ROOT}",
            f"mount -o remount,bind,ro {_ROOT}",
            f"mount -t proc proc {_ROOT}/proc",
            f"{tmpfs},mode=755 none {_ROOT}/dev",
            f"ln -s /proc/self/fd {_ROOT}/dev/fd",
            f"mkdir {_ROOT}/dev/shm",
            f"{tmpfs},nodev,noexec,mode=1777,size={SHARED_MEMORY} none {_ROOT}/dev/shm",
            f"{tmpfs},nodev,{self.temporary} none {_ROOT}/tmp",
            f"mount --bind /etc/hosts {_ROOT}/etc/hosts",
        ]
        for device in _DEVICES:
            path = f"{_ROOT}/dev/{device}"
            lines += [f"touch {path}", f"mount --bind /dev/{device} {path}"]
        for volume in self.volumes:
            lines.append(f"mount --bind {volume.folder} {_ROOT}{volume.target}")
            if volume.read_only:
                lines.append(f"mount -o remount,bind,ro {_ROOT}{volume.target}")
        return lines
