"""Stop requests: signals that stop a run so that it can be resumed.

| signal | sent by | effect |
|---|---|---|
| SIGTERM, SIGUSR1 | schedulers, systemd, ``timeout`` | stop; training saves first |
| SIGHUP | a terminal that closes | the same, unless ``nohup`` made it ignored |
| SIGINT | Ctrl-C | the same; a second one ends the run at once |
| SIGQUIT | Ctrl-\\ | ends the run at once |
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from pipeline.errors import Interrupted
from pipeline.orchestrate.user_errors import RERUN

# Schedulers send SIGTERM or SIGUSR1 before they take the machine away, sometimes both.
_OF_SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1)
_OF_TERMINALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)


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
        self._ends_at_once = False

    def __call__(self) -> bool:
        return self._requested

    def install(self) -> None:
        """Install the signal handlers, in the main thread."""
        for number in _OF_SCHEDULERS:
            signal.signal(number, self._handle)
        for number in _OF_TERMINALS:
            # nohup ignores SIGHUP; a script's shell ignores the keys for `./launch.sh JOB &`. Such
            # a run is meant to outlive the terminal.
            if signal.getsignal(number) is not signal.SIG_IGN:
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
        except KeyboardInterrupt:
            if self._ends_at_once:
                raise
            raise interrupted() from None
        finally:
            self._raises = False

    def check(self) -> None:
        """Raise Interrupted if a stop was requested."""
        if self._requested:
            raise interrupted()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = not self._requested
        self._requested = True
        if number == signal.SIGQUIT or (number == signal.SIGINT and not first):
            self._ends_at_once = True
            raise KeyboardInterrupt
        if first:
            # The signal may have interrupted the main thread while it was writing to the same
            # stream, which then refuses a second writer. Or the terminal is gone. The message is
            # not worth a crash.
            with contextlib.suppress(RuntimeError, OSError):
                self._announce(self._announcement(number))
        if self._raises:
            # Once only: a second SIGTERM must not hit the clean-up that the first one started.
            self._raises = False
            # Ray's C++ code passes on no other exception of a signal handler. ``at_once`` turns it
            # into Interrupted.
            raise KeyboardInterrupt

    def _announcement(self, number: int) -> str:
        if not self._after_step:
            return "stopping"
        hint = " (Ctrl-C again stops at once)" if number == signal.SIGINT else ""
        return f"stopping after the current step{hint}"


def interrupted() -> Interrupted:
    """The error of a run that stopped on request."""
    return Interrupted("stopped on request", remedy=RERUN)
