"""Survey of sources with one tar or one folder per class."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from pipeline.errors import DataError
from pipeline.sources import names, splits
from pipeline.sources.class_order import ordered_classes, visible_entries
from pipeline.sources.layout import Entries
from pipeline.sources.remote import Entry, Storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.splits import Division
from pipeline.sources.units import Part, SplitName, Survey, Unit, fingerprint_items, pack_units

CONCURRENT_REQUESTS = 16  # tars or folders of a remote store that are listed at the same time

# Cuts one tar or folder into parts: (storage, parent folder, name, bytes) -> parts.
PartFinder = Callable[[Storage, str, str, int], list[Part]]
# The parts of all classes in a folder: (storage, folder) -> parts.
PartsOfFolder = Callable[[Storage, str], Iterator[Part]]


def survey_classes(
    storage: Storage, root: str, config: SourceConfig, *, layout: str, find_parts: PartsOfFolder
) -> Survey:
    """Survey a source of one tar or folder per class, at the top or below folders of splits.

    Raises:
        DataError: it holds no classes, or some that the class list lacks (D5), or a folder of a
            split is missing or holds none of the classes.
    """
    division = splits.folders(config, storage, root, _possible_splits(storage, root))
    parts_of = {
        split: list(find_parts(storage, folder)) for split, folder in division.splits.items()
    }
    parts_of, notes = _labelled(division, parts_of, root, config)
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
        notes=[*notes, *_notes(all_parts)],
    )


def class_entries(storage: Storage, root: str, config: SourceConfig, entries: Entries) -> Entries:
    """The entries of the folder that holds the classes: of the first split, or of the root."""
    folder = next(iter(splits.folders(config, storage, root, _class_like(entries)).splits.values()))
    return entries if folder == root else visible_entries(storage, folder)


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


def _possible_splits(storage: Storage, root: str) -> list[str]:
    return _class_like(visible_entries(storage, root))


def _class_like(entries: Entries) -> list[str]:
    """Folders and class tars: what may be a split or a class."""
    return [
        name
        for name, entry in entries.items()
        if entry["type"] == "directory" or names.is_class_tar(name)
    ]


def _labelled(
    division: Division, parts_of: dict[SplitName, list[Part]], root: str, config: SourceConfig
) -> tuple[dict[SplitName, list[Part]], list[str]]:
    """The parts without a test folder that has no labels, and notes for the user.

    Such a folder has no class in common with the training images: those of a competition's test
    set lie together in one folder, which is no class.

    Raises:
        DataError: a validation folder has no labels, or one that the job names.
    """
    trained = {part.group for split in ("train", "") for part in parts_of.get(split, ())}
    notes = list(division.notes)
    for split, parts in list(parts_of.items()):
        groups = {part.group for part in parts}
        if split in ("train", "") or not trained or trained & groups:
            continue
        folder = division.splits[split].removeprefix(root).lstrip("/")
        if config.splits is not None or folder not in names.TEST_NAMES:
            inside = f"only {', '.join(sorted(groups)[:5])}" if groups else "no class at all"
            raise DataError(
                f"{folder} has no class in common with the training images: it has {inside}",
                place=config.root,
                remedy=f"sort the images of {folder} by class, or set `splits` without it",
            )
        del parts_of[split]
        notes = [f"{folder} is not used: its images have no labels (none of the other classes)"]
    # Without a validation split, images are held out of the training images.
    if "train" in parts_of and "validation" not in parts_of:
        parts_of[""] = parts_of.pop("train")
    return parts_of, notes


def _notes(parts: Iterable[Part]) -> list[str]:
    empty = sorted({part.group for part in parts if part.last == 0})
    return [f"{len(empty)} classes have no image: {', '.join(empty[:5])}"] if empty else []
