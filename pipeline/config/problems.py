"""Several things wrong with a job, told in one message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
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
    errors = [ConfigError(one.cause, place=one.place, remedy=one.remedy) for one in dict.fromkeys(problems)]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError("\n".join([f"{len(errors)} problems:", *(error.message for error in errors)]))


def closest(word: str, choices: Iterable[str], likeness: float = 0.55) -> str:
    """The choice most like ``word``, or '' where nothing is like it; ``likeness``: share of equal letters."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=likeness)
    return found[0] if found else ""


def did_you_mean(word: str, choices: Iterable[str], what: str) -> str:
    """A remedy: the closest choice, or all of them where nothing is close."""
    names = sorted(choices)
    best = closest(word, names)
    if best:
        return f"did you mean '{best}'?"
    return f"{what}: {', '.join(names)}" if names else f"{what}: none"
