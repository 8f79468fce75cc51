"""The application with all its commands."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Annotated

import typer

from pipeline import __version__
from pipeline.cli import (
    bench,
    chaos,
    checks,
    config,
    doctor,
    job,
    model,
    node,
    plan,
    prepared_data,
    replay,
    runs,
    tensorboard,
)

_LIBRARIES = ("torch", "ray", "deepspeed")  # those that a report of a bug needs


def _print_version(requested: bool) -> None:
    # An eager callback runs before the missing command is reported. The versions come from the
    # packages' metadata: importing the packages would take seconds.
    if requested:
        libraries = (f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)
        python = f"Python {platform.python_version()}"
        print(f"pipeline {__version__} ({', '.join([python, *libraries])})")
        raise typer.Exit


def _options_of_the_program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    pass


app = typer.Typer(
    subcommand_metavar="COMMAND [arguments]",
    epilog="JOB.yaml [options] is short for run JOB.yaml [options]: see run --help.",
    rich_markup_mode=None,  # plain help: in its boxes, flags would show a type, "<bool>"
    help="Large-scale vision pretraining: prepare, pretrain, fine-tune, evaluate, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # main() reports errors
)

# The usual form comes first: "Usage: ./launch.sh JOB.yaml [options] | COMMAND [arguments]".
app.callback(options_metavar="JOB.yaml [options] |")(_options_of_the_program)
# Registered here, not by decorators in the modules: the order is that of --help.
app.command("run", epilog=job.SHIPPED_JOBS)(job.run)
app.command("train")(job.train)
app.command("runs")(runs.runs)
app.command("logs")(runs.logs)
app.command("stop")(runs.stop)
app.command("fetch")(runs.fetch)
app.command("send", hidden=True)(runs.send)
app.command("plan")(plan.plan)
app.command("doctor")(doctor.doctor)
app.command("verify")(runs.verify)
app.command("replay")(replay.replay)
app.command("chaos")(chaos.chaos)
app.command("predict")(model.predict)
app.command("weights")(model.weights)
app.command("export")(model.export)
app.command("schema")(config.schema)
app.command("explain")(config.explain)
app.command("tensorboard")(tensorboard.tensorboard)
app.command("test", context_settings=checks.PASS_ON_ARGUMENTS)(checks.test)
app.add_typer(bench.app, name="bench")
app.add_typer(prepared_data.app, name="data")
app.add_typer(node.app, name="node")
