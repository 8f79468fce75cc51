"""The layouts of sources, found by listing the folder ``layouts``. Adding one is adding a file.

The job schema, the detection, the survey and the reader ask this registry; none has a list of its
own. Names and descriptions are read without importing a layout.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import plugins

if TYPE_CHECKING:
    from pipeline.sources.layout import Layout

_FOLDER = Path(__file__).parent / "layouts"


@functools.cache
def descriptions() -> dict[str, str]:
    """First docstring line of every layout, by name, sorted."""
    return {name: plugins.description(path) for name, path in plugins.files(_FOLDER).items()}


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
