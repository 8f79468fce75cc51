"""The kinds of blocks, found by listing the folder ``kinds``. Adding a kind is adding one file there:

    FACTS = BlockFacts(title="ConvNeXt", ...)     read by `facts` without importing the file: no torch
    KIND = BlockKind(ConvNeXtBlock)               imported by `kind` when a network is built

The job schema, the checks, the network, the exporter and the contract tests read this registry; none has a list of its own.
"""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.blocks.facts import BlockFacts

if TYPE_CHECKING:
    from pipeline.blocks.kind import BlockKind

_FOLDER = Path(__file__).parent / "kinds"


@functools.cache
def facts() -> dict[str, BlockFacts]:
    """Facts of every kind, by name (the name of its file), sorted.

    Raises:
        ValueError: a file of ``kinds`` has no ``FACTS = BlockFacts(...)`` made of literals.
    """
    files = sorted(_FOLDER.glob("*.py"))
    return {path.stem: _read_facts(path) for path in files if not path.stem.startswith("_")}


def kind(name: str) -> BlockKind:
    """The modules of a kind. Raises KeyError if there is none of this name."""
    if name not in facts():
        raise KeyError(name)
    found: BlockKind = importlib.import_module(f"pipeline.blocks.kinds.{name}").KIND
    return found


def _read_facts(path: Path) -> BlockFacts:
    # Importing the file would import torch, which takes seconds that a configuration check must not cost. So the call is
    # read from the syntax tree instead: FACTS = BlockFacts(title="ConvNeXt") -> {"title": "ConvNeXt"}.
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "FACTS"
            and isinstance(node.value, ast.Call)
        ):
            values: dict[str, Any] = {}
            for keyword in node.value.keywords:
                try:
                    values[str(keyword.arg)] = ast.literal_eval(keyword.value)
                except ValueError:
                    raise ValueError(f"{path}: FACTS.{keyword.arg} must be a literal") from None
            return BlockFacts(**values)
    raise ValueError(f"{path} defines no FACTS = BlockFacts(...)")
