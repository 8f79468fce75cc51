"""Interfaces with which a stage reports to the user. The driver supplies the implementations."""

from __future__ import annotations

from typing import Protocol


class Log(Protocol):
    """Logs a message for the user; ``level`` is info, warning or error."""

    def __call__(self, text: str, level: str = "info") -> None: ...


class Progress(Protocol):
    """Reports that ``done`` of ``total`` units of ``task`` are finished.

    ``details``: texts to show beside the count, such as rates, the most important one first. A
    narrow terminal leaves out the last ones.
    """

    def __call__(self, task: str, done: int, total: int, *details: str) -> None: ...
