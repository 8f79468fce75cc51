"""Parses command lines with the real parser of the pipeline, without running them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import typer.main

from pipeline.cli import app
from tests.docs.markdown import ROOT

SHORT_FOR_RUN = re.compile(r".*\.ya?ml$")


def arguments_after_program(words: Sequence[str]) -> list[str] | None:
    """Arguments that a command line hands to the pipeline; None if it runs another program.

    Example: ``PYTHON=/usr/bin/python3.12 ./launch.sh verify runs/a`` -> ["verify", "runs/a"].
    """
    words = list(words)
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        words.pop(0)
    if words[:1] in (["./launch.sh"], ["pipeline"]):
        return words[1:]
    for start in range(len(words) - 1):
        if words[start : start + 2] == ["-m", "pipeline"]:
            return words[start + 2 :]
    return None


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, object]]:
    """The full name of the command, such as "data show", and its parameters.

    Raises:
        Exception: the parser's own, for an unknown command or option, or a missing argument.
        AssertionError: ``./launch.sh install`` with an unknown set of packages.
    """
    arguments = list(arguments)
    if arguments[:1] == ["install"]:  # handled by launch.sh itself
        for name in arguments[1:]:
            assert (ROOT / "requirements" / f"{name}.txt").is_file(), name
        assert arguments[1:]
        return "install", {}
    if arguments and SHORT_FOR_RUN.fullmatch(arguments[0]):
        arguments.insert(0, "run")
    context = typer.main.get_command(app).make_context("pipeline", arguments)
    path: list[str] = []
    while hasattr(context.command, "resolve_command"):
        remaining = [*context._protected_args, *context.args]
        name, command, rest = context.command.resolve_command(context, remaining)
        assert command is not None
        path.append(str(name))
        context = command.make_context(name, rest, parent=context)
    return " ".join(path), context.params


def command_names() -> set[str]:
    """Full names of all commands, and of the groups of commands."""
    names = {"install"}

    def collect(command: object, above: str) -> None:
        for name, child in getattr(command, "commands", {}).items():
            names.add(f"{above} {name}".strip())
            collect(child, f"{above} {name}".strip())

    collect(typer.main.get_command(app), "")
    return names


def is_known(words: Sequence[str], names: set[str]) -> bool:
    """True if the first words name a command or a shipped job. JOB.yaml stands for any job."""
    first = words[0]
    if first.startswith("-"):
        return True
    if SHORT_FOR_RUN.fullmatch(first):
        return first.isupper() or first.startswith("JOB") or (ROOT / first).is_file()
    groups = {name.split()[0] for name in names if " " in name}
    if first in groups:
        return len(words) == 1 or " ".join(words[:2]) in names
    return first in names


def exists(path: str) -> bool:
    """True if a path of the documents exists.

    Upper-case parts such as NAME stand for any name. A module may be named without its suffix,
    which is also the name of the package that it may become.
    """
    parts = [re.sub(r"[A-Z]{2,}|<[a-z_]+>", "*", part) for part in Path(path).parts]
    if path.endswith(".md"):
        return (ROOT / path).exists()
    pattern = "/".join(parts)
    return any(ROOT.glob(pattern)) or any(ROOT.glob(f"{pattern}.py"))
