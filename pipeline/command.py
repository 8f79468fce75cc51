"""The command that the user typed: usage texts and remedies must work where they are read."""

from __future__ import annotations

import os

# launch.sh sets it; every process of a run inherits it.
VARIABLE = "PIPELINE_COMMAND"


def program() -> str:
    """``./launch.sh`` in a checkout, ``pipeline`` after an installation."""
    return os.environ.get(VARIABLE) or "pipeline"


def command(*arguments: object) -> str:
    """A command line: ``command("verify", "runs/a")`` -> "./launch.sh verify runs/a"."""
    return " ".join([program(), *map(str, arguments)])
