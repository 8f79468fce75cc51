"""A tree of values -> a checked Job; everything that is wrong is told by file:line, key, expectation and remedy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from pipeline.config.schema import Job
from pipeline.config.schema_text import describe
from pipeline.config.yaml_tree.diagnostics import Problem, refuse
from pipeline.config.yaml_tree.reading import Node, scalar
from pipeline.suggest import closest, did_you_mean

Location = Sequence[int | str]


def validate(tree: Node) -> Job:
    """Check a tree against the schema, strictly: no text for numbers, no fractions for whole numbers.

    Raises one ConfigError that names every problem (C1, C4).
    """
    try:
        return Job.model_validate_json(json.dumps(tree.data()), strict=True)
    except ValidationError as error:
        refuse(_problems(tree, error.errors(include_url=False, include_context=True)))
        raise  # a validation error without problems would be a bug; never hide it


def _problems(tree: Node, errors: Sequence[Any]) -> list[Problem]:
    unknown: dict[str, Problem] = {}  # told first: others may follow from them
    wrong: dict[str, Problem] = {}
    for error in errors:
        path, known = _path(error["loc"])
        if error["type"] == "extra_forbidden":
            path = [*path, str(error["loc"][len(path)])]
            unknown[".".join(path)] = _unknown_key(tree, path, known)
        elif error["loc"] and error["loc"][-1] == "[key]":
            cause = f"'{path[-1]}' cannot be the name of a dataset: letters, digits, '-' and '_', a letter or digit first"
            wrong[".".join(path)] = Problem(_place(tree, path), cause, "rename it")
        else:
            wrong.setdefault(".".join(path), _wrong_value(tree, path, known))
    return [*unknown.values(), *wrong.values()]


def _path(location: Location) -> tuple[list[str], describe.Field]:
    """The part of pydantic's location that is a path of keys; it also names union branches and list positions."""
    path: list[str] = []
    known = describe.root()
    for part in location:
        child = known.child(part) if isinstance(part, str) and part != "[key]" else None
        if child is None:
            break
        path, known = [*path, str(part)], child
    return path, known


def _place(tree: Node, path: Sequence[str]) -> str:
    """Where a key is written, or else the nearest section around it."""
    for depth in range(len(path), -1, -1):
        node = tree.get(*path[:depth])
        if node is not None:
            return node.origin
    return tree.origin


def _unknown_key(tree: Node, path: list[str], section: describe.Field) -> Problem:
    key, above = path[-1], ".".join(path[:-1])
    cause = f"unknown key '{key}'" + (f" in {above}" if above else "")
    if key == "base" and "recipe" in section.keys:
        return Problem(_place(tree, path), cause, "did you mean 'recipe'?")
    if not closest(key, section.keys, likeness=0.8):
        elsewhere = [one.dotted for one in describe.all_fields() if one.path[-1] == key]
        if elsewhere:
            return Problem(_place(tree, path), cause, f"it belongs to {' or '.join(elsewhere)}")
    return Problem(_place(tree, path), cause, did_you_mean(key, section.keys, "keys here"))


def _wrong_value(tree: Node, path: list[str], known: describe.Field) -> Problem:
    dotted = known.dotted or "the job"
    node = tree.get(*path)
    if node is None:
        cause = f"{dotted} is missing: expected {known.expectation}"
        remedy = (
            f"write it, or name a recipe that has it, or add --set {dotted}=VALUE"
            if "stages" in path
            else "write it"
        )
        return Problem(_place(tree, path), cause, remedy)
    given = json.dumps(node.data(), ensure_ascii=False)
    given = given if len(given) <= 60 else given[:57] + "..."
    return Problem(
        node.origin, f"{dotted}: expected {known.expectation}, given {given}", _hint(node, known)
    )


def _hint(node: Node, known: describe.Field) -> str:
    value, wanted = node.value, known.expectation
    if (
        isinstance(value, str)
        and "number" in wanted
        and isinstance(scalar(value.strip()), (int, float))
    ):
        return f"take the quotes away: {value.strip()}"
    if isinstance(value, (int, float)) and wanted.startswith("text"):
        return "put it in quotes"
    if (
        isinstance(value, float)
        and "whole number" in wanted
        and value.is_integer()
        and value < 1e12
    ):
        return f"write {int(value)}"
    names = [name.strip("'") for name in wanted.replace("one of ", "").split(", ")]
    if isinstance(value, str) and (best := closest(value, names)):
        return f"did you mean '{best}'?"
    return known.description
