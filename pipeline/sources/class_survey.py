"""Survey of sources with one tar or one folder per class."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from pipeline.errors import DataError
from pipeline.sources import names
from pipeline.sources.class_order import ordered_classes, visible_entries
from pipeline.sources.layout import Entries
from pipeline.sources.remote import Entry, Storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import Part, SplitName, Survey, Unit, fingerprint_items, pack_units

CONCURRENT_REQUESTS = 16  # tars or folders of a remote store that are listed at the same time

# Cuts one tar or folder into parts: (storage, parent folder, name, bytes) -> parts.
PartFinder = Callable[[Storage, str, str, int], list[Part]]
# The parts of all classes in a folder: (storage, folder) -> parts.
PartsOfFolder = Callable[[Storage, str], Iterator[Part]]


def survey_classes(
    storage: Storage, root: str, config: SourceConfig, *, layout: str, find_parts: PartsOfFolder
) -> Survey:
    """Survey a source of one tar or folder per class, at the top or below train/ and val/.

    Raises:
        DataError: it holds no classes, or some that the class list lacks (D5).
    """
    parts_of: dict[SplitName, list[Part]] = {
        split: list(find_parts(storage, folder))
        for split, folder in _split_folders(storage, root).items()
    }
    all_parts = [part for parts in parts_of.values() for part in parts]
    if not all_parts:
        missing = "tars" if layout == "class_tars" else "folders of images"
        remedy = "provide one per class, named by the class; or set `layout`"
        raise DataError(f"holds no {missing}", place=config.root, remedy=remedy)
    classes = ordered_classes(storage, root, config, sorted({part.group for part in all_parts}))
    label_of = {class_id: label for label, (class_id, _) in enumerate(classes)}
    units: list[Unit] = []
    for split, parts in parts_of.items():
        # Labels depend on the classes of all splits, so they are filled in only now.
        labelled = (replace(part, label=label_of[part.group]) for part in parts)
        units += pack_units(labelled, split, len(units))
    return Survey(
        layout=layout,
        classes=classes,
        units=units,
        fingerprint_items=fingerprint_items(root, units),
        notes=_notes(all_parts),
    )


def class_entries(storage: Storage, root: str, entries: Entries) -> Entries:
    """The entries of the folder that holds the classes: of train/ if it exists, or of the root."""
    train = names.first_present(names.TRAIN_NAMES, entries)
    return entries if train is None else visible_entries(storage, f"{root}/{train}")


def parts_of_all(
    find: PartFinder, storage: Storage, folder: str, entries: list[Entry]
) -> Iterator[Part]:
    """The parts of each tar or folder, in order.

    Requests to a remote store overlap; their results keep the order.
    """
    entry_names = [posixpath.basename(entry["name"].rstrip("/")) for entry in entries]
    sizes = [int(entry["size"] or 0) for entry in entries]
    with ThreadPoolExecutor(1 if storage.is_local else CONCURRENT_REQUESTS) as pool:
        for parts in pool.map(partial(find, storage, folder), entry_names, sizes):
            yield from parts


def _split_folders(storage: Storage, root: str) -> dict[SplitName, str]:
    """The folders to read, by split.

    Three cases: train/ and val/ (two splits); train/ alone, or classes at the top ("": the split is
    decided per image).
    """
    entries = visible_entries(storage, root)
    subfolders = [name for name, entry in entries.items() if entry["type"] == "directory"]
    train = names.first_present(names.TRAIN_NAMES, subfolders)
    validation = names.first_present(names.VALIDATION_NAMES, subfolders)
    # A validation folder counts only beside a training folder: "test" alone may be a class.
    if train is None:
        return {"": root}
    if validation is None:
        return {"": f"{root}/{train}"}
    return {"train": f"{root}/{train}", "validation": f"{root}/{validation}"}


def _notes(parts: Iterable[Part]) -> list[str]:
    empty = sorted({part.group for part in parts if part.last == 0})
    return [f"{len(empty)} classes have no image: {', '.join(empty[:5])}"] if empty else []
