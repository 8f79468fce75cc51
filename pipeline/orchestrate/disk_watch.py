"""Says that the files of a run cannot be written, while that is so.

The training processes report through such files, also that a checkpoint could not be written: on a
full disk, their warnings would not arrive before it has room again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from pipeline.layout import RunDir
from pipeline.reporting import Log

_PERIOD_S = 10.0
_BYTES = bytes(1 << 14)  # more than what fits beside the data of other small files


@contextlib.contextmanager
def watched_disk(run_dir: RunDir, log: Log, period_s: float = _PERIOD_S) -> Iterator[None]:
    """Warn once when the files of a run cannot be written any more, and say when they can again."""
    ended = threading.Event()

    def watch() -> None:
        fails = False
        while not ended.wait(period_s):
            try:
                _try(run_dir)
            except OSError as error:
                if not fails:
                    log(
                        f"{run_dir.path} cannot be written: {error.strerror}; training continues, "
                        "its messages are shown when it can be written",
                        "warning",
                    )
                fails = True
            else:
                if fails:
                    log(f"{run_dir.path} can be written again")
                fails = False

    # In a thread: storage that does not answer must not stop the driver.
    thread = threading.Thread(target=watch, name="disk watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _try(run_dir: RunDir) -> None:
    try:
        with open(run_dir.probe, "wb") as file:
            file.write(_BYTES)
    finally:
        with contextlib.suppress(OSError):
            run_dir.probe.unlink()
