"""The command line: parses arguments and calls the rooms that do the work.

One module per group of commands. Each command imports its room when it runs, so that ``--help``
answers without loading torch, Ray or pydantic.
"""

from pipeline.cli.app import app
from pipeline.cli.entry_point import main

__all__ = ["app", "main"]
