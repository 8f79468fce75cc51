"""Registry of block kinds: every file in the folder ``kinds`` is one kind.

To add a kind, add one file there with two assignments:

    FACTS = BlockFacts(title="ConvNeXt")     read by `facts` without importing the file (no torch)
    KIND = BlockKind(ConvNeXtBlock)          imported by `kind` when a network is built

The job schema, the checks, the network, the exporter and the contract tests read this registry, so
no other file lists the kinds.
"""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.blocks.facts import BlockFacts

if TYPE_CHECKING:
    from pipeline.blocks.kind import BlockKind

_FOLDER = Path(__file__).parent / "kinds"


@functools.cache
def facts() -> dict[str, BlockFacts]:
    """Return the facts of every kind, keyed by the name of its file and sorted by it.

    Raises:
        ValueError: a file in ``kinds`` has no ``FACTS = BlockFacts(...)`` with literal arguments.
    """
    paths = sorted(_FOLDER.glob("*.py"))
    return {path.stem: read_facts(path) for path in paths if not path.stem.startswith("_")}


def kind(name: str) -> BlockKind:
    """Import and return a kind's modules. Raises KeyError if no kind has this name."""
    if name not in facts():
        raise KeyError(name)
    block_kind: BlockKind = importlib.import_module(f"pipeline.blocks.kinds.{name}").KIND
    return block_kind


def read_facts(path: Path) -> BlockFacts:
    """Read ``FACTS`` from a kind's source file. Raises ValueError as ``facts`` does."""
    # Importing the file would import torch, which takes seconds. A configuration check must not
    # wait for that, so this reads the call from the syntax tree:
    #     FACTS = BlockFacts(title="C2f", shortcut=False)  ->  {"title": "C2f", "shortcut": False}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "FACTS"
            and isinstance(node.value, ast.Call)
        ):
            return _evaluate(path, node.value)
    raise ValueError(f"{path} defines no FACTS = BlockFacts(...)")


def _evaluate(path: Path, call: ast.Call) -> BlockFacts:
    arguments = {}
    for keyword in call.keywords:
        try:
            arguments[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError:
            raise ValueError(f"{path}: FACTS.{keyword.arg} must be a literal") from None
    try:
        return BlockFacts(**arguments)
    except TypeError as error:  # an unknown or a missing field
        raise ValueError(f"{path}: FACTS is incomplete or has an unknown field: {error}") from None
