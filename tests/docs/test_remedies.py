"""Commands that error messages, help texts and log lines name exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.command_line import command_names, is_known
from tests.docs.markdown import ROOT

# In running text: "./launch.sh verify", "python -m pipeline train", "`pipeline run ...`".
IN_TEXT = re.compile(r"(?:\./launch\.sh|-m pipeline|[`'\"]pipeline) +([\w./-]+(?: [a-z]+)?)")


def constant_words(call: ast.Call) -> list[str]:
    """The literal words at the start of ``command("data", "show", path)`` -> ["data", "show"]."""
    words: list[str] = []
    for argument in call.args:
        if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
            break
        words += shlex.split(argument.value)
    return words


def commands_named(tree: ast.AST) -> Iterator[tuple[int, list[str]]]:
    """(line, first words) of each command that a module prints."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("command", "command.command"):
            words = constant_words(node)
            if words:
                yield node.lineno, words
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for match in IN_TEXT.finditer(node.value):
                yield node.lineno, match[1].split()


@pytest.mark.parametrize(
    ("line", "known"),
    [
        ('command("verify", path)', True),
        ('command("data", "show", path)', True),
        ('command("data", "verify", path)', False),
        ('command(job, "--rehearse")', True),
        ('remedy = f"./launch.sh repair {path}"', False),
        ('remedy = "run `pipeline predict DIR`"', True),
        ('remedy = "a bug of the pipeline: report it"', True),
        ('text = "./launch.sh jobs/own_images.yaml --set data.root=DIR"', True),
        ('text = "./launch.sh jobs/no_such_job.yaml"', False),
    ],
)
def test_the_search_itself_finds_wrong_commands(line: str, known: bool) -> None:
    names = command_names()
    assert all(is_known(words, names) for _, words in commands_named(ast.parse(line))) is known


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "pipeline").rglob("*.py")),
    ids=lambda path: str(Path(path).relative_to(ROOT)),
)
def test_commands_named_in_a_module_exist(path: Path) -> None:
    names = command_names()
    for line, words in commands_named(ast.parse(path.read_text(encoding="utf-8"))):
        assert is_known(words, names), f"{path}:{line}: no command {' '.join(words)}"
