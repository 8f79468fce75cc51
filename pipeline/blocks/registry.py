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

from pipeline import plugins
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
    return {name: _read(path) for name, path in plugins.files(_FOLDER).items()}


def kind(name: str) -> BlockKind:
    """Import and return a kind's modules. Raises KeyError if no kind has this name."""
    if name not in facts():
        raise KeyError(name)
    block_kind: BlockKind = importlib.import_module(f"pipeline.blocks.kinds.{name}").KIND
    return block_kind


def _read(path: Path) -> BlockFacts:
    # FACTS = BlockFacts(title="C2f", shortcut=False)  ->  {"title": "C2f", "shortcut": False}
    call = plugins.assigned(path, "FACTS")
    if not isinstance(call, ast.Call):
        raise ValueError(f"{path} defines no FACTS = BlockFacts(...)")
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
