"""A small file system of our own, which may be filled without harm to anybody."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_TRIES = 20  # to unmount: a process may still have a file open
_PAUSE_S = 0.5


@contextlib.contextmanager
def own_disk(folder: Path, size: int) -> Iterator[bool]:
    """Mount a file system in memory at a folder; yields whether that is possible (it needs root).

    What was written there is gone afterwards. ``size``: in bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    is_mounted = os.geteuid() == 0 and _succeeds(mount)
    try:
        yield is_mounted
    finally:
        for _ in range(_TRIES if is_mounted else 0):
            if _succeeds(["umount", str(folder)]):
                break
            time.sleep(_PAUSE_S)


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
