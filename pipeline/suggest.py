"""Suggest the closest valid choice for a mistyped word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: str, choices: Iterable[str], likeness: float = 0.55) -> str:
    """The choice most similar to ``word``, or '' if none is similar.

    ``likeness``: least similarity, 0 to 1: the share of matching letters in both words.
    """
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=likeness)
    return matches[0] if matches else ""


def did_you_mean(word: str, choices: Iterable[str], label: str) -> str:
    """A remedy: the closest choice, or all choices (introduced by ``label``) if none is close."""
    names = sorted(choices)
    suggestion = closest(word, names)
    if suggestion:
        return f"did you mean '{suggestion}'?"
    return f"{label}: {', '.join(names)}" if names else f"{label}: none"
