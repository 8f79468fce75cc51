"""Which paths only this machine can see, as far as its table of mounts tells."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

# Every machine has its own, whatever they are mounted from.
_OWN_FOLDERS = ("/tmp", "/var/tmp", "/dev", "/run", "/proc")
# File systems on a disk or in the memory of one machine. One that is not listed may be shared: the
# check of all machines before the first stage tells.
LOCAL_TYPES = {
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "bcachefs"),
    *("tmpfs", "ramfs", "overlay", "squashfs", "vfat", "exfat", "ntfs3"),
}
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Mount:
    """A mounted file system."""

    folder: str
    type: str


def why_not_shared(path: str | Path, shared_folder: str = "") -> str:
    """Why other machines cannot see ``path``, as a phrase; '' if they may.

    Args:
        shared_folder: a folder that the user knows to be shared; so is all that lies on the same
            mount, such as a local disk that this machine exports.

    Example: "/tmp/runs" -> "every machine has a /tmp of its own".
    """
    # A link below a home folder often leads to shared storage.
    real = os.path.realpath(path)
    mount = mount_of(real)
    if shared_folder:
        known = os.path.realpath(shared_folder)
        if real == known or known in map(str, Path(real).parents):
            return ""
        if os.path.isdir(known) and mount_of(known) == mount:
            return ""
    # A shared file system may be mounted below one of them: /run/shared.
    for folder in _OWN_FOLDERS:
        if (real == folder or real.startswith(f"{folder}/")) and not mount.folder.startswith(
            f"{folder}/"
        ):
            return f"every machine has a {folder} of its own"
    if mount.type in LOCAL_TYPES:
        return f"it is on a local file system of this machine ({mount.type} at {mount.folder})"
    return ""


def mount_of(path: str) -> Mount:
    """The mount that holds an absolute path, which need not exist; without a type if not known."""
    best = Mount("/", "")
    try:
        table = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return best
    # Example of a line: "36 35 98:0 / /mnt/data rw,noatime shared:1 - ext4 /dev/sda1 rw".
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        folder = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split()[4])
        inside = folder == "/" or path == folder or path.startswith(f"{folder}/")
        # A later mount at the same folder hides an earlier one.
        if inside and len(folder) >= len(best.folder):
            best = Mount(folder, after.split()[0])
    return best
