"""Stop requests: SIGTERM, SIGUSR1 (preemption) and Ctrl-C stop a run so that it can be resumed.

A second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from pipeline.errors import Interrupted
from pipeline.orchestrate.user_errors import RERUN

# Schedulers send SIGTERM or SIGUSR1 before they take the machine away, sometimes both.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """A flag that the signals set. Calling it tells whether a stop was requested.

    Args:
        announce: shows a message to the user when the first signal arrives.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self._requested = False
        self._after_step = False
        self._raises = False

    def __call__(self) -> bool:
        return self._requested

    def install(self) -> None:
        """Install the signal handlers, in the main thread.

        Repeat this after ``ray.init``, which replaces the handler of SIGTERM.
        """
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    @contextlib.contextmanager
    def after_step(self) -> Iterator[None]:
        """While open, announce a stop after the current step: for training, which saves first."""
        self._after_step = True
        try:
            yield
        finally:
            self._after_step = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """While open, a signal raises Interrupted: for work that has nothing to save."""
        self.check()
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def check(self) -> None:
        """Raise Interrupted if a stop was requested."""
        if self._requested:
            raise interrupted()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = not self._requested
        self._requested = True
        if not first and number == signal.SIGINT:
            raise KeyboardInterrupt
        if first:
            # The signal may have interrupted the main thread while it was writing to the same
            # stream, which then refuses a second writer. The message is not worth a crash.
            with contextlib.suppress(RuntimeError):
                self._announce(self._announcement(number))
        if self._raises:
            # Once only: a second SIGTERM must not hit the clean-up that the first one started.
            self._raises = False
            raise interrupted()

    def _announcement(self, number: int) -> str:
        if not self._after_step:
            return "stopping"
        hint = " (Ctrl-C again stops at once)" if number == signal.SIGINT else ""
        return f"stopping after the current step{hint}"


def interrupted() -> Interrupted:
    """The error of a run that stopped on request."""
    return Interrupted("stopped on request", remedy=RERUN)
