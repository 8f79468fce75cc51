"""Connects this process with a Ray that runs, and keeps the signal handlers as they are."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator

from pipeline.errors import StageError

_POLL_S = 0.1
_END_S = 30


@contextlib.contextmanager
def ray_connection(
    address: str, check: Callable[[], None], not_connected: Callable[[str], StageError]
) -> Iterator[None]:
    """Connect with the Ray at ``address`` while the context is open.

    Args:
        check: called several times per second while it connects; may raise.
        not_connected: the error for a cause.
    """
    import ray

    connection = _Connection(address)
    try:
        with _kept_sigterm_handler():
            connection.start()
            while connection.is_alive():
                connection.join(_POLL_S)
                check()
        if connection.error is not None:
            raise not_connected(str(connection.error)) from connection.error
        yield
    finally:
        connection.join(_END_S)  # a stop request may arrive while it connects
        ray.shutdown()


class _Connection(threading.Thread):
    """Connects this process with Ray at ``address``."""

    def __init__(self, address: str) -> None:
        super().__init__(name="ray-connection", daemon=True)
        self._address = address
        self.error: Exception | None = None

    def run(self) -> None:
        import ray

        try:
            # The output of workers goes to their log files, not to the driver's.
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
            # Ray would print the log of a lost raylet, in colour. Our own errors say what matters.
            ray._private.worker.print_to_stdstream = _discard
        except Exception as error:
            self.error = error


def _discard(*arguments: object, **options: object) -> None:
    """Print nothing."""


@contextlib.contextmanager
def _kept_sigterm_handler() -> Iterator[None]:
    """Put back the handler of SIGTERM: Ray's C++ code installs one that ends the process.

    A SIGTERM in between waits until the handler is back, so this thread and those that it starts
    block the signal meanwhile.
    """
    handler = signal.getsignal(signal.SIGTERM)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
