"""Several things wrong with a job, told in one message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, what, and what to do about it."""

    place: str
    cause: str
    remedy: str = ""


def refuse(problems: Sequence[Problem]) -> None:
    """Raise one ConfigError that names every problem; do nothing if there is none."""
    errors = [
        ConfigError(one.cause, place=one.place, remedy=one.remedy)
        for one in dict.fromkeys(problems)
    ]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError(
            "\n".join([f"{len(errors)} problems:", *(error.message for error in errors)])
        )
