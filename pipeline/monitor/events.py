"""Writes and reads the event log of a stage: one JSON object per line, readable while it grows.

A writer can be killed at any byte, and a resumed writer repeats the steps after its checkpoint.
Readers therefore skip incomplete lines, and at each ``start`` event they drop the earlier events of
later steps. Example: "start 0, steps 1 2 3 4, start 2, steps 3 4" reads as steps 1 2 3 4, where 3
and 4 are those of the resumed writer.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

_REQUIRED = ("kind", "step", "time")  # written even if they are zero


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line: ``kind`` is start, step, evaluation, message or end; of the driver, see goodput."""

    kind: str
    step: int
    time: float  # seconds since 1970
    total: int = 0  # steps of the whole stage
    epoch: int = 0  # from 1; 0: not known
    scalars: dict[str, float] = field(default_factory=dict)
    text: str = ""
    level: str = ""
    seconds: dict[str, float] = field(default_factory=dict)  # since the last such event, by part


class EventWriter:
    """Appends events to a file.

    A write that fails raises nothing, because a log must not end a training: events are lost until
    the file can be written again. The first of them is reported on standard error.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._clock = clock
        self._fails = False
        self._file = open(path, "ab")  # noqa: SIM115 (lives as long as the writer)
        # A killed predecessor may have left half a line. Close it, or the first new event would
        # become part of it and be lost with it.
        if not _ends_with_newline(path):
            self._file.write(b"\n")

    def write(
        self,
        kind: str,
        step: int,
        *,
        total: int = 0,
        epoch: int = 0,
        scalars: dict[str, float] | None = None,
        text: str = "",
        level: str = "",
        seconds: dict[str, float] | None = None,
        at: float | None = None,
    ) -> Event:
        """Append one event and return it; empty fields are left out.

        Args:
            at: the time of the event; now by default.

        Values that are not finite are written as ``NaN`` and ``Infinity``: an extension of JSON
        that Python reads back.
        """
        event = Event(
            kind=kind,
            step=step,
            time=self._clock() if at is None else at,
            total=total,
            epoch=epoch,
            scalars=scalars or {},
            text=text,
            level=level,
            seconds=seconds or {},
        )
        line = {key: value for key, value in asdict(event).items() if key in _REQUIRED or value}
        self._append(
            json.dumps(line, separators=(",", ":")).encode() + b"\n", sync=kind == "message"
        )
        return event

    def close(self) -> None:
        with contextlib.suppress(OSError):  # reported when the line was written
            self._file.close()

    def _append(self, line: bytes, *, sync: bool) -> None:
        try:
            self._file.write(line)
            # Flush to the kernel, so that a killed process loses nothing and the display keeps up.
            self._file.flush()
            # On a network file system, other machines see the lines only after a sync. Messages are
            # rare, and there is one with each checkpoint.
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            if not self._fails:
                text = f"{self._path} cannot be written: {error}; events are lost until it can be"
                print(f"warning: {text}", file=sys.stderr, flush=True)
            self._fails = True
        else:
            self._fails = False


class Follower:
    """Reads a growing event file piece by piece, like ``tail -f``. The file need not exist yet."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0

    def poll(self) -> list[Event]:
        """Return the events completed since the last call."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        # Leave a line that is still being written for the next call.
        complete = data.rfind(b"\n") + 1
        self._offset += complete
        return list(_parse(data[:complete]))


def read_events(path: Path) -> list[Event]:
    """Read the valid events: those of steps that a resumed writer repeated are left out."""
    events: list[Event] = []
    for event in Follower(path).poll():
        if event.kind == "start":
            events = [earlier for earlier in events if earlier.step <= event.step]
        events.append(event)
    return events


def read_last_events(path: Path, size: int = 1 << 16) -> list[Event]:
    """The valid events in the last ``size`` bytes of a log, which may be long; [] without one."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - size))
            return list(_parse(file.read()))  # the first line may be cut; it is skipped
    except FileNotFoundError:
        return []


def _parse(data: bytes) -> Iterator[Event]:
    for line in data.splitlines():
        try:
            yield Event(**json.loads(line))
        except (ValueError, TypeError):  # half a line, or a line of another version
            continue


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            return True
        file.seek(size - 1)
        return file.read(1) == b"\n"
