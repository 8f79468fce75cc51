"""The entry point: runs a command and turns every exception into a message and an exit code.

Exit codes: 0 done; 2 wrong arguments, job or data; 3 a stage failed; 70 a bug of the pipeline;
75 stopped on request, can be resumed; 130 ended at once by a second Ctrl-C.
"""

from __future__ import annotations

import sys
import traceback

from rich.console import Console
from rich.text import Text

from pipeline.cli.app import app
from pipeline.cli.output import keep_output_alive
from pipeline.command import program
from pipeline.errors import Interrupted
from pipeline.orchestrate.job_files import SUFFIXES
from pipeline.orchestrate.user_errors import user_error

INTERNAL_ERROR = 70
ENDED_AT_ONCE = 130  # 128 + SIGINT


def main() -> None:
    """Run the command of ``sys.argv``. ``JOB.yaml`` as first argument means ``run JOB.yaml``."""
    arguments = sys.argv[1:]
    if arguments and arguments[0].endswith(SUFFIXES):
        arguments.insert(0, "run")
    keep_output_alive()
    try:
        app(args=arguments, prog_name=program())
    except KeyboardInterrupt:
        sys.exit(_report_end_at_once())
    except SystemExit as end:
        # typer turns a KeyboardInterrupt inside a command into an exit without a message.
        if end.code == ENDED_AT_ONCE:
            _report_end_at_once()
        raise
    except Exception as error:
        sys.exit(_report(error))


def _report(error: Exception) -> int:
    """Print an exception for the user; returns the exit code."""
    # Errors go to standard error, so that `schema > file` and `--dry-run > file` stay clean.
    console = Console(stderr=True)
    known = user_error(error)
    if known is None:
        traceback.print_exc()
        console.print(
            Text("this is a bug of the pipeline: please report the lines above", "bold red")
        )
        return INTERNAL_ERROR
    if isinstance(known, Interrupted):
        text = Text(known.message, "yellow")
    else:
        text = Text.assemble(("error: ", "bold red"), known.message)
    # Keep lines whole: users copy paths and commands from them.
    console.print(text, soft_wrap=True)
    return known.exit_code


def _report_end_at_once() -> int:
    Console(stderr=True).print(
        Text("ended at once; rerun the same command to resume from the last checkpoint", "yellow"),
        soft_wrap=True,
    )
    return ENDED_AT_ONCE
