"""Validates a tree of values against the schema and reports every problem in plain words.

Pydantic's errors name internal types and union branches. Each is translated to file:line, the key,
the values that it accepts and a remedy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.schema import Job
from pipeline.config.schema_text import describe, suggestions
from pipeline.config.yaml_tree.diagnostics import Problem, raise_problems
from pipeline.config.yaml_tree.reading import Node, scalar
from pipeline.suggest import closest

LONGEST_VALUE = 60  # characters of a value that a message quotes


def validate(tree: Node) -> Job:
    """Check a tree against the schema, strictly: no text for numbers, no 3.0 for whole numbers.

    Raises:
        ConfigError: names every problem (C1, C4).
    """
    try:
        # As JSON, because only there strict mode accepts a list for a tuple.
        return Job.model_validate_json(json.dumps(tree.data()), strict=True)
    except ValidationError as error:
        raise_problems(_problems(tree, error.errors(include_url=False, include_context=True)))
        raise  # a validation error without problems would be a bug; never hide it


def _problems(tree: Node, errors: Sequence[ErrorDetails]) -> list[Problem]:
    # Unknown keys come first: a mistyped required key is unknown and missing at the same time, and
    # the first of the two messages explains the second.
    unknown: dict[str, Problem] = {}
    invalid: dict[str, Problem] = {}
    for error in errors:
        path, key = _path(error["loc"])
        if error["type"] == "extra_forbidden":
            path = [*path, str(error["loc"][-1])]
            unknown[".".join(path)] = _unknown_key(tree, path, key)
        elif error["loc"] and error["loc"][-1] == "[key]":
            cause = (
                f"'{path[-1]}' cannot be the name of a dataset: use letters, digits, '-' and '_', "
                "with a letter or a digit first"
            )
            invalid[".".join(path)] = Problem(_place(tree, path), cause, "rename it")
        else:
            # One value can violate several branches of a union; the first message is enough.
            invalid.setdefault(".".join(path), _invalid_value(tree, path, key))
    # `splits` is a mapping or 'none'. A mistake in the mapping violates both branches: the problem
    # of the key inside says more than that of the whole.
    wrong = [*unknown, *invalid]
    inner = {
        dotted: problem
        for dotted, problem in invalid.items()
        if not any(other.startswith(f"{dotted}.") for other in wrong)
    }
    return [*unknown.values(), *inner.values()]


def _path(location: Sequence[int | str]) -> tuple[list[str], describe.SchemaKey]:
    """The keys in a pydantic location, which also names union branches and list positions.

    Example: ("stages", "pretrain", "micro_batch", "constrained-int") -> stages.pretrain.micro_batch
    """
    path: list[str] = []
    key = describe.root()
    for part in location:
        child = key.child(part) if isinstance(part, str) and part != "[key]" else None
        if child is not None:
            path.append(str(part))
            key = child
    return path, key


def _place(tree: Node, path: Sequence[str]) -> str:
    """file:line of a key, or of the nearest section around it."""
    for depth in range(len(path), -1, -1):
        node = tree.get(*path[:depth])
        if node is not None:
            return node.origin
    return tree.origin


def _unknown_key(tree: Node, path: list[str], section: describe.SchemaKey) -> Problem:
    name = path[-1]
    above = ".".join(path[:-1])
    cause = f"unknown key '{name}'" + (f" in {above}" if above else "")
    place = _place(tree, path)
    return Problem(place, cause, suggestions.remedy(name, section))


def _invalid_value(tree: Node, path: list[str], key: describe.SchemaKey) -> Problem:
    dotted = key.dotted or "the job"
    node = tree.get(*path)
    if node is None:
        cause = f"{dotted} is missing: expected {key.expectation}"
        remedy = "write it"
        if "stages" in path:
            remedy = f"write it, or name a recipe that has it, or add --set {dotted}=VALUE"
        return Problem(_place(tree, path), cause, remedy)
    given = json.dumps(node.data(), ensure_ascii=False)
    if len(given) > LONGEST_VALUE:
        given = f"{given[: LONGEST_VALUE - 3]}..."
    cause = f"{dotted}: expected {key.expectation}, given {given}"
    return Problem(node.origin, cause, _hint(node, key))


def _hint(node: Node, key: describe.SchemaKey) -> str:
    """The remedy for an invalid value: the likely mistake, or else the meaning of the key."""
    value = node.value
    expected = key.expectation
    if isinstance(value, str) and "number" in expected:
        text = value.strip()
        if isinstance(scalar(text), (int, float)):
            return f"take the quotes away: {text}"
    if isinstance(value, (int, float)) and expected.startswith("text"):
        return "put it in quotes"
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e12
    if isinstance(value, float) and whole and "whole number" in expected:
        return f"write {int(value)}"
    choices = re.findall(r"'([^']+)'", expected)
    words = [item.value for item in value] if isinstance(value, list) else [value]
    for word in words:
        if isinstance(word, str) and word not in choices and (best := closest(word, choices)):
            return f"did you mean '{best}'?"
    return key.description
