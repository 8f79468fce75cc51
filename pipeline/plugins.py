"""Folders in which every Python file is one plugin: read without importing the files.

Importing a block kind or an optimizer imports torch, which takes seconds. A configuration check
must not wait for that, so names, descriptions and literal facts come from the syntax tree.
"""

from __future__ import annotations

import ast
from pathlib import Path


def files(folder: Path) -> dict[str, Path]:
    """The plugins of a folder by name, sorted: its Python files without a leading underscore."""
    paths = sorted(folder.glob("*.py"))
    return {path.stem: path for path in paths if not path.stem.startswith("_")}


def description(path: Path) -> str:
    """The first line of a plugin's docstring. Raises ValueError if there is none."""
    text = ast.get_docstring(_parsed(path))
    if not text:
        raise ValueError(f"{path} has no docstring: its first line describes it")
    return text.partition("\n")[0]


def assigned(path: Path, name: str) -> ast.expr:
    """What ``name`` is assigned at the top of a plugin. Raises ValueError if it is not there."""
    for node in _parsed(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value
    raise ValueError(f"{path} defines no {name}")


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
