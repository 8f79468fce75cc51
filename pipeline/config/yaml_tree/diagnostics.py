"""Collects several problems of a job, so that one message reports all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """One problem: its place (file:line), its cause and a remedy."""

    place: str
    cause: str
    remedy: str = ""


def problem_of(error: ConfigError) -> Problem:
    """The problem that an error describes, to report it together with others."""
    return Problem(error.place, error.cause, error.remedy)


def raise_problems(problems: Sequence[Problem]) -> None:
    """Do nothing if there are no problems.

    Raises:
        ConfigError: names every problem, each of them once.
    """
    # Two stages that name the same recipe find its mistakes twice; dict.fromkeys keeps one each.
    errors = [
        ConfigError(problem.cause, place=problem.place, remedy=problem.remedy)
        for problem in dict.fromkeys(problems)
    ]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError(
            "\n".join([f"{len(errors)} problems:", *(error.message for error in errors)])
        )
