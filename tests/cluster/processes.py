"""Processes of the host and of its machines, and waiting for a condition."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


def wait_until(
    condition: Callable[[], object], aim: str, timeout_s: float = 30.0, poll_s: float = 0.02
) -> None:
    """Wait for a condition. Raises TimeoutError, which names the aim, when the time is over."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {aim}")
        time.sleep(poll_s)


def children(pid: int) -> list[int]:
    """Process IDs of the children of a process."""
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []


def command_line(pid: int) -> str:
    """The command line of a process, arguments separated by spaces; "" if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def all_pids() -> list[int]:
    """All processes of the host, those of machines too."""
    return sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def namespace_of(pid: int) -> str:
    """The process namespace that a process is in: the same for all processes of a machine."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return f"process {pid} has ended"


@contextlib.contextmanager
def held(pids: Sequence[int]) -> Iterator[None]:
    """While open, these processes stand still: a small job must not end before what is tested."""
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
