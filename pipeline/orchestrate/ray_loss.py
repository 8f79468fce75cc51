"""Ends this process, with the right message, if it is stuck in a call to a Ray that was lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from pipeline.errors import PipelineError, StageError

# A minute after the loss Ray's client ends the process with exit code 1 and a text of its own.
_STUCK_S = 45.0
_POLL_S = 0.5


class RayLost(StageError):
    """A server process of Ray died: nothing that needs Ray can continue."""


class LossWatch(threading.Thread):
    """Watches for a loss that the main thread does not react to, until the context is left.

    Ray's calls wait for a dead server and cannot be interrupted. The main thread, if it is in one,
    neither sees the loss nor gets on.

    Args:
        is_lost: whether a server was lost; called from this thread.
        check: raises the error that says which.
    """

    def __init__(self, is_lost: Callable[[], bool], check: Callable[[], None]) -> None:
        super().__init__(name="ray-loss", daemon=True)
        self._is_lost = is_lost
        self._check = check
        self._left = threading.Event()

    def __enter__(self) -> LossWatch:
        # Signals are for the main thread: this one, which inherits that they are blocked, would
        # take them while Ray's own handler is installed.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._left.set()

    def run(self) -> None:
        """Wait for a loss, then for the main thread to react to it."""
        lost_at = None
        while not self._left.wait(_POLL_S):
            if lost_at is None and self._is_lost():
                lost_at = time.monotonic()
            if lost_at is not None and time.monotonic() - lost_at > _STUCK_S:
                self._end()

    def _end(self) -> None:
        try:
            self._check()
        except PipelineError as error:
            print(f"error: {error.message}", file=sys.stderr, flush=True)
        # Not sys.exit, which would end this thread only. The keeper notices, and cleans up.
        os._exit(RayLost.exit_code)
