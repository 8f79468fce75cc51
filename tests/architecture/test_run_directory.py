"""``pipeline/layout.py`` is the operand place that knows which file of a run lies where."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.architecture.source_tree import PACKAGE, python_files, shown, tree_of

NAMES = {
    "stages",
    "checkpoints",
    "tensorboard",
    "logs",
    "export",
    "profiles",
    "replaced",
    "generation",
    "run.json",
    "run.yaml",
    "run.log",
    "job.json",
    "weights.safetensors",
    "weights.json",
    "dataset.json",
    "classes.json",
}
MODULES = [path for path in python_files("pipeline") if path != PACKAGE / "layout.py"]


def _constants(node: ast.AST) -> Iterator[str]:
    """Literal text in an operand of ``/``, an argument of ``joinpath`` or an f-string."""
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value


def path_literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, literal) of every part of a path that is built in ``tree``."""
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            operands = (node.left, node.right)
            parts = [
                operand for operand in operands if isinstance(operand, ast.Constant | ast.JoinedStr)
            ]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("joinpath", "with_name", "glob", "rglob"):
                parts = list(node.args)
        elif isinstance(node, ast.JoinedStr):
            parts = [
                part
                for part in node.values
                if isinstance(part, ast.Constant) and "/" in str(part.value)
            ]
        for part in parts:
            for literal in _constants(part):
                yield getattr(part, "lineno", 0), literal


def test_no_path_of_the_run_directory_is_built_outside_its_layout() -> None:
    built = [
        f"{shown(path)}:{line}: {literal}"
        for path in MODULES
        for line, literal in path_literals(tree_of(path))
        if NAMES & set(literal.strip("/").split("/"))
    ]
    assert not built


@pytest.mark.parametrize(
    "code",
    [
        "a / 'stages' / b",
        "a.joinpath('logs', b)",
        "f'{a}/checkpoints/{b}'",
        "a.with_name('run.json')",
    ],
)
def test_the_check_sees_every_way_to_build_a_path(code: str) -> None:
    literals = [literal for _, literal in path_literals(ast.parse(code))]
    assert any(NAMES & set(literal.strip("/").split("/")) for literal in literals)
