"""Seconds of the host in the phases of a step, of this process: its times, logged on every rank.

A GPU works behind the host, so there a phase is the time in which its kernels were launched, or in
which the host waited for the device. Waiting for other ranks is part of backward and update.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Self

from pipeline.layout import RunDir
from pipeline.monitor.events import EventWriter
from pipeline.reporting import Log

DATA = "data"
FORWARD = "forward"
BACKWARD = "backward"
UPDATE = "update"


class StepTimes:
    """Adds up the seconds of each phase."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time inside the block belongs to the phase."""
        begin = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        seconds = self._seconds
        self._seconds = {}
        return seconds


class TimesLog:
    """The log of the times of one rank, one line per logged interval.

    A log that cannot be written does not end the training: after a warning nothing is written.
    """

    def __init__(self, run_dir: RunDir, stage: str, rank: int, log: Log) -> None:
        self._log = log
        self._path = run_dir.times(stage, rank)
        self._writer: EventWriter | None = None
        with self._warned():
            self._writer = EventWriter(self._path)

    def write(self, step: int, seconds: Mapping[str, float]) -> None:
        """Append a line: seconds by phase of the steps since the line before, up to ``step``."""
        writer = self._writer
        if writer is not None:
            with self._warned():
                writer.write("step", step, seconds=dict(seconds))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            with self._warned():
                self._writer.close()

    @contextlib.contextmanager
    def _warned(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            self._log(f"times are not logged: {self._path} cannot be written: {error}", "warning")
