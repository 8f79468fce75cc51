"""The command that the user typed, so that usage texts and remedies name one that works where they are read."""

from __future__ import annotations

import os

VARIABLE = "PIPELINE_COMMAND"  # set by launch.sh, inherited by every process of a run


def program() -> str:
    """``./launch.sh`` in a checkout, ``pipeline`` after an install."""
    return os.environ.get(VARIABLE) or "pipeline"


def command(*arguments: object) -> str:
    """A command line for the user: ``command("verify", "runs/a")`` -> "./launch.sh verify runs/a"."""
    return " ".join([program(), *map(str, arguments)])
