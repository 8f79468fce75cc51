"""Habits that make a line hard to read, found in the syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Callable

import pytest

from tests.architecture.source_tree import python_files, shown, tree_of

MOST_POSITIONAL = 5
MOST_POSITIONAL_FIELDS = 3
POSITIONAL_RECORDS = {"NetworkSpec"}  # widths, depths, columns, classes: as the paper lists them
# Calls whose arguments are a list of like things, not parameters with meanings.
LISTS = {"print", "zip", "product", "chain", "max", "min", "gather", "Path", "joinpath", "printf"}


def packed_assignment(node: ast.AST) -> bool:
    """``a, b = f(), g()``: several assignments in one line, with calls on the right."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    packed = isinstance(node.targets[0], ast.Tuple)
    return packed and any(isinstance(child, ast.Call) for child in ast.walk(node.value))


def many_positional_arguments(node: ast.AST) -> bool:
    """A call with more positional arguments than a reader can match to parameters."""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    plain = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
    return name not in LISTS and len(plain) > MOST_POSITIONAL


def positional_record(node: ast.AST) -> bool:
    """A dataclass of many fields that can be filled by position."""
    if not isinstance(node, ast.ClassDef):
        return False
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    if not any(decorator.startswith("dataclass") for decorator in decorators):
        return False
    if node.name in POSITIONAL_RECORDS:
        return False
    fields = [
        statement
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and "kw_only" not in ast.unparse(statement)
    ]
    positional = not any("kw_only=True" in decorator for decorator in decorators)
    return positional and len(fields) > MOST_POSITIONAL_FIELDS


def expression_for_its_effect(node: ast.AST) -> bool:
    """``condition and call()`` as a statement."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.BoolOp | ast.IfExp)


RULES = [
    packed_assignment,
    many_positional_arguments,
    positional_record,
    expression_for_its_effect,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.__name__))
def test_no_line_breaks_the_rule(rule: Callable[[ast.AST], bool]) -> None:
    broken = [
        f"{shown(path)}:{getattr(node, 'lineno', 0)}"
        for path in python_files("pipeline", "tests")
        for node in ast.walk(tree_of(path))
        if rule(node)
    ]
    assert not broken


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (packed_assignment, "a, b = f(), 1"),
        (many_positional_arguments, "f(1, 2, 3, 4, 5, 6)"),
        (positional_record, "@dataclass\nclass A:\n a: int\n b: int\n c: int\n d: int"),
        (expression_for_its_effect, "a and b()"),
    ],
)
def test_each_rule_finds_what_it_is_for(rule: Callable[[ast.AST], bool], code: str) -> None:
    assert any(rule(node) for node in ast.walk(ast.parse(code)))
