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
    if not problems:
        return
    if len(problems) == 1:
        raise ConfigError(problems[0].cause, place=problems[0].place, remedy=problems[0].remedy)
    lines = [f"{len(problems)} problems:"]
    lines += [ConfigError(problem.cause, place=problem.place, remedy=problem.remedy).message for problem in problems]
    raise ConfigError("\n".join(lines))


def closest(word: str, choices: Iterable[str]) -> str:
    """The choice most like ``word``, or '' where nothing is like it."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.55)
    return found[0] if found else ""


def did_you_mean(word: str, choices: Iterable[str], what: str) -> str:
    """A remedy: the closest choice, or all of them where nothing is close."""
    names = sorted(choices)
    best = closest(word, names)
    if best:
        return f"did you mean '{best}'?"
    return f"{what}: {', '.join(names)}" if names else f"{what}: none"
