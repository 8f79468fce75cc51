"""Ends this process, with the right message, if it is stuck in a call to a Ray that was lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from pipeline.errors import PipelineError, StageError

# A minute after the loss Ray's client ends the process with exit code 1 and a text of its own.
_STUCK_S = 45.0
_POLL_S = 0.5


class RayLost(StageError):
    """A server process of Ray died: nothing that needs Ray can continue."""


@contextlib.contextmanager
def loss_watched(is_lost: Callable[[], bool], check: Callable[[], None]) -> Iterator[None]:
    """While open, a loss that the main thread does not react to ends this process.

    Ray's calls wait for a dead server and cannot be interrupted. The main thread, if it is in one,
    neither sees the loss nor gets on.

    Args:
        is_lost: whether a server was lost; called from another thread.
        check: raises the error that says which.
    """
    left = threading.Event()
    watch = threading.Thread(
        target=_watch, args=(left, is_lost, check), name="ray-loss", daemon=True
    )
    # Signals are for the main thread: the new one, which inherits that they are blocked, would take
    # them while Ray's own handler is installed.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    watch.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        yield
    finally:
        left.set()


def _watch(left: threading.Event, is_lost: Callable[[], bool], check: Callable[[], None]) -> None:
    """Wait for a loss, then for the main thread to react to it."""
    lost_at = None
    while not left.wait(_POLL_S):
        if lost_at is None and is_lost():
            lost_at = time.monotonic()
        if lost_at is not None and time.monotonic() - lost_at > _STUCK_S:
            _end(check)


def _end(check: Callable[[], None]) -> NoReturn:
    try:
        check()
    except PipelineError as error:
        print(f"error: {error.message}", file=sys.stderr, flush=True)
    # Not sys.exit, which would end this thread only. The keeper notices, and cleans up.
    os._exit(RayLost.exit_code)
