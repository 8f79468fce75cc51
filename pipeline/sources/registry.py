"""The layouts of sources, found by listing the folder ``layouts``. Adding one is adding a file.

The job schema, the detection, the survey and the reader ask this registry; none has a list of its
own. Names and descriptions are read without importing a layout.
"""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.sources.layout import Layout

_FOLDER = Path(__file__).parent / "layouts"


@functools.cache
def descriptions() -> dict[str, str]:
    """First docstring line of every layout, by name, sorted."""
    files = [path for path in sorted(_FOLDER.glob("*.py")) if not path.stem.startswith("_")]
    return {path.stem: _first_line(path) for path in files}


def layout(name: str) -> Layout:
    """A layout. Raises KeyError if there is none of this name."""
    if name not in descriptions():
        raise KeyError(name)
    result: Layout = importlib.import_module(f"pipeline.sources.layouts.{name}").LAYOUT
    return result


def in_detection_order() -> list[tuple[str, Layout]]:
    """All layouts with their names, the most specific first."""
    layouts = [(name, layout(name)) for name in descriptions()]
    return sorted(layouts, key=lambda named: named[1].order)


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{path} has no docstring: its first line describes the layout")
    return text.splitlines()[0]
