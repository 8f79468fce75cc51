"""The event log of a stage: one JSON object a line, appended and flushed, readable while it grows.

A writer can be killed at any byte and a resumed one goes on from a checkpoint that lies before the last event; readers
therefore skip what is not a whole line and drop, at each ``start``, the earlier events of later steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Event:
    """One line: ``kind`` is start, step, evaluation, message or hparams."""

    kind: str
    step: int
    time: float  # seconds since 1970
    total: int = 0  # steps of the whole stage
    epoch: int = 0
    scalars: dict[str, float] = field(default_factory=dict)
    text: str = ""
    level: str = ""


class EventWriter:
    """Appends events to a file; a half-written last line of a killed predecessor is closed off first."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._clock = clock
        self._file = open(path, "ab")  # noqa: SIM115 (lives as long as the writer)
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
    ) -> None:
        """Append one event; fields that say nothing are left out. Values that are not finite are written as JSON's
        extension ``NaN``/``Infinity``, which Python reads back."""
        event = asdict(Event(kind, step, self._clock(), total, epoch, scalars or {}, text, level))
        line = {
            key: value for key, value in event.items() if key in ("kind", "step", "time") or value
        }
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Follower:
    """Reads a growing event file piece by piece, like ``tail -f``; the file may not exist yet."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0

    def poll(self) -> list[Event]:
        """Events completed since the last call."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data.rfind(b"\n") + 1
        self._offset += complete
        return list(_parse(data[:complete]))


def read_events(path: Path) -> list[Event]:
    """All events that count: those of steps that a later resume repeated are left out."""
    events: list[Event] = []
    for event in Follower(path).poll():
        if event.kind == "start":
            events = [earlier for earlier in events if earlier.step <= event.step]
        events.append(event)
    return events


def _parse(data: bytes) -> Iterator[Event]:
    for line in data.splitlines():
        try:
            value: Any = json.loads(line)
            yield Event(**value)
        except (ValueError, TypeError):  # half a line, or one of another version
            continue


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            return True
        file.seek(size - 1)
        return file.read(1) == b"\n"
