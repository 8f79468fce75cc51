"""Suggestions for mistyped words: the closest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: str, choices: Iterable[str], likeness: float = 0.55) -> str:
    """The choice most like ``word``, or '' if none is similar.

    ``likeness``: minimum share of equal letters, 0 to 1.
    """
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=likeness)
    return found[0] if found else ""


def did_you_mean(word: str, choices: Iterable[str], what: str) -> str:
    """A remedy: the closest choice, or all choices (introduced by ``what``) if none is close."""
    names = sorted(choices)
    best = closest(word, names)
    if best:
        return f"did you mean '{best}'?"
    return f"{what}: {', '.join(names)}" if names else f"{what}: none"
