"""Requests to stop: SIGTERM, SIGUSR1 (preemption) and Ctrl-C ask for a graceful end; a second Ctrl-C ends at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from pipeline.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """A flag that signals set; calling it tells whether the run was asked to stop."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self._asked = self._at_once = False

    def __call__(self) -> bool:
        return self._asked

    def install(self) -> None:
        """Take the signals over; to be repeated after ``ray.init``, which replaces handlers. Main thread only."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a request raises Interrupted wherever the main thread is: for work that has nothing to save."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self._asked:
            raise interrupted()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._asked = self._asked, True
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._at_once:
            self._at_once = (
                False  # a second TERM must not hit the clean-up that the first one started
            )
            raise interrupted()
        if not again:
            hint = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            self._announce(f"stopping at the next step{hint}")


def interrupted() -> Interrupted:
    """The error of a run that stopped on request."""
    return Interrupted("stopped on request", remedy="the same command goes on from here")
