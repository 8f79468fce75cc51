"""Seconds in the phases of a step, of this process: its times, logged on every rank.

The wait for data is measured on the host. What a GPU does is measured by the GPU: it works behind
the host, so that the clock of the host would only show when kernels were launched. Waiting for
other ranks is part of backward and update.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Self

import torch

from pipeline.layout import RunDir
from pipeline.monitor.events import EventWriter
from pipeline.reporting import Log

DATA = "data"
FORWARD = "forward"
BACKWARD = "backward"
UPDATE = "update"


class StepTimes:
    """Adds up the seconds of each phase of the steps on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.Event, torch.Event]] = []  # begin and end of a phase

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time inside the block belongs to the phase."""
        if self._device.type == "cuda" and name != DATA:
            begin_event = self._record()
            yield
            self._events.append((name, begin_event, self._record()))
        else:
            begin = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - begin)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call. Waits for the device."""
        if self._events:  # they are of one stream: when the last has passed, all have
            self._events[-1][2].synchronize()
        for name, begin, end in self._events:
            self._add(name, begin.elapsed_time(end) / 1000)  # milliseconds
        seconds = self._seconds
        self._seconds = {}
        self._events = []
        return seconds

    def _record(self) -> torch.Event:
        """Let the device note the time when it has done all work launched so far."""
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


class TimesLog:
    """The log of the times of one rank, one line per logged interval.

    Before them a line says where the process runs: its host, and its process ID there. ``step``:
    where it starts. A log that cannot be written does not end the training: after a warning nothing
    is written.
    """

    def __init__(self, run_dir: RunDir, stage: str, rank: int, log: Log, step: int) -> None:
        self._log = log
        self._path = run_dir.times(stage, rank)
        self._writer: EventWriter | None = None
        with self._warned():
            self._writer = EventWriter(self._path)
            place = {"pid": float(os.getpid())}
            self._writer.write("start", step, text=socket.gethostname(), scalars=place)

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
