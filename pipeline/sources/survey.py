"""Survey a source: its layout, classes and splits, cut into units of work.

Reads names and sizes, no image.
"""

from __future__ import annotations

from pipeline.errors import DataError
from pipeline.sources import registry
from pipeline.sources.class_order import visible_entries
from pipeline.sources.remote import Storage, open_storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import Survey


def survey(config: SourceConfig) -> Survey:
    """Survey a source.

    Raises:
        DataError: the source is missing, has no known layout, or has classes that its class list
            lacks (D5).
    """
    storage, root = open_root(config)
    name = config.layout if config.layout != "auto" else _detect_layout(storage, root, config)
    return registry.layout(name).survey(storage, root, config)


def open_root(config: SourceConfig) -> tuple[Storage, str]:
    """The storage of a dataset's root, and the path in it. Raises DataError."""
    storage, root = open_storage(config.root)
    # A dataset of the Hugging Face hub is a name, not a folder.
    needs_folder = config.layout == "auto" or registry.layout(config.layout).is_folder
    if needs_folder and not storage.is_folder(root):
        remedy = "correct `root`, or mount the file system"
        raise DataError("there is no such folder", place=storage.shown(root), remedy=remedy)
    return storage, root


def _detect_layout(storage: Storage, root: str, config: SourceConfig) -> str:
    entries = visible_entries(storage, root)
    for name, layout in registry.in_detection_order():
        if layout.detect(storage, root, entries):
            return name
    remedy = (
        "provide class tars or class folders (at the top, or below train/ and val/), "
        "or set `layout`"
    )
    raise DataError("holds no images in a layout that is known", place=config.root, remedy=remedy)
