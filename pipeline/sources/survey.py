"""Survey a source: its layout, classes and splits, cut into units of work.

Reads names and sizes, no image. The automatic values of the configuration (``inspection``) and the
preparation use the same survey.
"""

from __future__ import annotations

import os

from pipeline.errors import DataError
from pipeline.sources import contents, registry, splits
from pipeline.sources.class_order import visible_entries
from pipeline.sources.class_survey import class_like
from pipeline.sources.folder_files import folder_files, require_access
from pipeline.sources.remote import Storage, open_storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import SplitName, Survey
from pipeline.suggest import did_you_mean


def survey(config: SourceConfig) -> Survey:
    """Survey a source.

    Raises:
        DataError: the source is missing, has no known layout, or has classes that its class list
            lacks (D5).
    """
    storage, root = open_root(config)
    _require_access(storage, root)
    name = config.layout if config.layout != "auto" else _detect_layout(storage, root, config)
    return registry.layout(name).survey(storage, root, config)


def _require_access(storage: Storage, root: str) -> None:
    """Raise DataError if the folders in the root may not be read; it names all that may not."""
    if not storage.is_local or not os.path.isdir(root):
        return
    if not os.access(root, os.R_OK | os.X_OK):
        require_access([root])
    with os.scandir(root) as entries:
        folders = [entry.path for entry in entries if entry.is_dir()]
    # Detection would end at the first of them.
    if not all(os.access(path, os.R_OK | os.X_OK) for path in folders):
        require_access(folder_files(storage, root, check_access=True).refused)


def open_root(config: SourceConfig) -> tuple[Storage, str]:
    """The storage of a dataset's root, and the path in it. Raises DataError."""
    storage, root = open_storage(config.root)
    # A dataset of the Hugging Face hub is a name, not a folder.
    needs_folder = config.layout == "auto" or registry.layout(config.layout).is_folder
    if needs_folder and not storage.is_folder(root):
        remedy = "correct `root`, or mount the file system"
        raise DataError("there is no such folder", place=storage.shown(root), remedy=remedy)
    return storage, root


def unknown_splits(config: SourceConfig) -> dict[SplitName, tuple[str, str]]:
    """(cause, remedy) for every name in the key `splits` that a local source does not have.

    Empty for a source that is elsewhere or missing, which only the survey can tell.

    Raises:
        DataError: the dataset cannot be read.
    """
    if config.splits is None or isinstance(config.splits, str) or not os.path.isdir(config.root):
        return {}
    storage, root = open_storage(config.root)
    entries = visible_entries(storage, root)
    for name, layout in registry.in_detection_order():
        # Layouts with names for their splits come before those of folders, and recognise a source
        # without reading it.
        if layout.split_names is None or config.layout not in (name, "auto"):
            continue
        if config.layout == "auto" and not layout.detect(storage, root, config, entries):
            continue
        present = layout.split_names(config.root)
        return {
            split: (
                f"the dataset has no split {chosen}",
                did_you_mean(chosen, present, "its splits"),
            )
            for split, chosen in splits.named_splits(config.splits).items()
            if chosen not in present
        }
    return {
        split: (f"{config.root} has no folder {name}", remedy)
        for split, name, remedy in splits.unknown_folders(config, storage, root)
    }


def _detect_layout(storage: Storage, root: str, config: SourceConfig) -> str:
    entries = visible_entries(storage, root)
    for name, layout in registry.in_detection_order():
        if layout.detect(storage, root, config, entries):
            return name
    splits.folders(config, storage, root, class_like(entries))  # may be unclear, or misspelled
    raise contents.describe(storage, root, config)
