"""All processes below this one, also those whose parents have died."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time

import psutil

_SET_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl
_POLL_S = 0.02


def adopt_orphans() -> None:
    """Make processes below this one whose parent dies its children: none escapes its end."""
    ctypes.CDLL(None).prctl(_SET_SUBREAPER, 1, 0, 0, 0)


def descendants() -> list[psutil.Process]:
    """The children of this process, their children, and so on."""
    return list(psutil.Process().children(recursive=True))


def is_alive(process: psutil.Process) -> bool:
    """False for a process that has ended, also before its parent has collected it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def reap() -> None:
    """Collect the children that have ended, adopted ones too."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def kill_descendants() -> None:
    """Kill every process below this one; returns when none is left."""
    while processes := descendants():
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        reap()
        time.sleep(_POLL_S)
