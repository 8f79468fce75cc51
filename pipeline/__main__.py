"""``python -m pipeline``, and the installed command ``pipeline``.

Importing the command line takes about a second. A stop request in that time must end the process as
a later one does, so the signals are handled before anything else is imported.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

_STOPPED = 75  # exit code of pipeline.errors.Interrupted, which is not imported yet
_ENDED_AT_ONCE = 130
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def main() -> None:
    """Run the command of ``sys.argv``."""
    # Ray's processes on a cluster have these blocked (orchestrate/node.py), and a driver that Ray
    # starts as a job inherits that.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_STOP_SIGNALS, signal.SIGINT))
    for number in _STOP_SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:  # not ignored, as SIGHUP is under nohup
            signal.signal(number, _stop)
    try:
        from pipeline.cli import main as command_line
    except KeyboardInterrupt:
        sys.exit(_ENDED_AT_ONCE)
    command_line()


def _stop(number: int, frame: FrameType | None) -> None:
    """End at once. A job that runs has replaced this handler (``StopRequest``)."""
    os.write(2, b"stopped on request\n  -> rerun the same command to resume\n")
    os._exit(_STOPPED)  # an exception could be caught by the import that it interrupts


if __name__ == "__main__":
    main()
