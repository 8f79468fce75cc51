"""How a stage reports to the user: a log line and the progress of a piece of work. The driver supplies both."""

from __future__ import annotations

from typing import Protocol


class Log(Protocol):
    """Logs a message for the user; ``level`` is info, warning or error."""

    def __call__(self, text: str, level: str = "info") -> None: ...


class Progress(Protocol):
    """Reports that ``done`` of ``total`` units of ``task`` are finished; ``detail``: rates and counts, as text."""

    def __call__(self, task: str, done: int, total: int, detail: str = "") -> None: ...
