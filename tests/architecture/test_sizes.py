"""Limits that keep a file readable: its length, the length of a function, comments, types."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

from tests.architecture.source_tree import python_files, shown, text_of, tree_of

LONGEST_MODULE = 350
LONGEST_FUNCTION = 60
MOST_ANY = 120
LEAST_COMMENTED = 0.05
PYTHON_FILES = python_files("pipeline", "tests")


def test_modules_fit_in_a_reading() -> None:
    lengths = {shown(path): text_of(path).count("\n") for path in PYTHON_FILES}
    assert not {path: length for path, length in lengths.items() if length > LONGEST_MODULE}


def test_functions_fit_on_a_screen() -> None:
    long: dict[str, int] = {}
    for path in PYTHON_FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    long[f"{shown(path)}:{node.name}"] = length
    assert not long


def test_the_formatter_is_never_switched_off() -> None:
    switches = ("fmt:" + " skip", "fmt:" + " off")
    assert not [
        shown(path) for path in PYTHON_FILES if any(switch in text_of(path) for switch in switches)
    ]


def _comment_lines(path: Path) -> tuple[int, int]:
    """(lines with a comment, those of them that hold nothing else)."""
    commented = 0
    alone = 0
    for token in tokenize.generate_tokens(io.StringIO(text_of(path)).readline):
        if token.type != tokenize.COMMENT or re.match(r"#\s*(noqa|type: ignore|!)", token.string):
            continue
        commented += 1
        alone += token.line.lstrip().startswith("#")
    return commented, alone


def test_enough_lines_are_commented_and_half_of_the_comments_stand_alone() -> None:
    lines = 0
    commented = 0
    alone = 0
    for path in python_files("pipeline"):
        lines += text_of(path).count("\n")
        in_file, alone_in_file = _comment_lines(path)
        commented += in_file
        alone += alone_in_file
    assert commented >= LEAST_COMMENTED * lines, f"{commented} of {lines} lines"
    assert alone >= commented / 2, f"{alone} of {commented} comments"


def test_any_is_rare() -> None:
    counts = {
        shown(path): len(re.findall(r"\bAny\b", text_of(path))) for path in python_files("pipeline")
    }
    most = sorted(counts.items(), key=lambda item: -item[1])[:10]
    assert sum(counts.values()) <= MOST_ANY, f"{sum(counts.values())}; most: {most}"
