"""Survey of sources with one tar or one folder per class."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from pipeline.errors import DataError
from pipeline.sources import class_sets, contents, names, splits
from pipeline.sources.class_order import ordered_classes, visible_entries
from pipeline.sources.flat_split import flat_parts
from pipeline.sources.folder_files import require_access
from pipeline.sources.layout import Entries
from pipeline.sources.remote import Entry, Storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.split_names import split_like
from pipeline.sources.splits import Division
from pipeline.sources.units import Part, SplitName, Survey, Unit, fingerprint_items, pack_units
from pipeline.sources.validation_labels import KAGGLE_LABELS, TINY_LABELS, labels_file

CONCURRENT_REQUESTS = 16  # tars or folders of a remote store that are listed at the same time


@dataclass(frozen=True, kw_only=True)
class ClassParts:
    """One tar or folder of a class, cut into parts.

    ``parts``: none if it is no class. ``notes``: what the user should know. ``refused``: files and
    folders that this user may not read.
    """

    parts: list[Part]
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


# Cuts one tar or folder into parts: (its path, its entry in the listing) -> parts.
PartFinder = Callable[[Storage, str, Entry], ClassParts]


def survey_classes(
    storage: Storage, root: str, config: SourceConfig, *, layout: str, find_parts: PartFinder
) -> Survey:
    """Survey a source of one tar or folder per class, at the top or below folders of splits.

    Raises:
        DataError: it holds no classes, or some that the class list lacks (D5), or a folder of a
            split is missing or holds none of the classes.
    """
    division = splits.folders(config, storage, root, class_like(visible_entries(storage, root)))
    notes: list[str] = []
    parts_of: dict[SplitName, list[Part]] = {}
    refused: list[str] = []
    for split, folder in division.splits.items():
        entries, unused = _entries_of_kind(storage, folder, layout)
        notes += unused
        classes_of_split = list(_parts_of_all(find_parts, storage, folder, entries))
        parts_of[split] = [part for entry in classes_of_split for part in entry.parts]
        notes += [note for entry in classes_of_split for note in entry.notes]
        refused += [path for entry in classes_of_split for path in entry.refused]
    require_access(refused)
    flat, unlabelled = _without_labels(storage, root, config, division, parts_of)
    # A test folder without labels cannot stand in for the validation split.
    division = replace(division, stand_in="") if unlabelled else division
    notes = [*division.notes, *notes, *unlabelled]
    all_parts = [part for parts in parts_of.values() for part in parts]
    ids = sorted({part.group for part in all_parts})
    if not all_parts or (len(ids) == 1 and config.classes == "auto"):
        contents.require_classes(storage, root, config, division.splits.values(), ids)
    counts = {split: class_sets.images_by_class(parts) for split, parts in parts_of.items()}
    class_sets.require_same(counts, config)
    classes = ordered_classes(storage, root, config, ids)
    label_of = {class_id: label for label, (class_id, _) in enumerate(classes)}
    units: list[Unit] = []
    for split in division.splits:
        # Labels depend on the classes of all splits, so they are filled in only now.
        if split in flat:
            labelled = flat_parts(storage, division.splits[split], flat[split], label_of)
        else:
            labelled = [
                replace(part, label=label_of[part.group]) for part in parts_of.get(split, ())
            ]
        # Without a validation split, images are held out of the training images.
        has_validation = parts_of.get("validation") or "validation" in flat
        key: SplitName = "" if split == "train" and not has_validation else split
        units += pack_units(labelled, key, len(units))
    return Survey(
        layout=layout,
        classes=classes,
        units=units,
        fingerprint_items=fingerprint_items(root, units),
        notes=[*notes, *class_sets.notes(counts)],
    )


def class_entries(storage: Storage, root: str, config: SourceConfig, entries: Entries) -> Entries:
    """The entries of the folder that holds the classes: of the first split, or of the root."""
    division = splits.divide(config.splits, list(class_like(entries)))
    name = next(iter(division.splits.values())).strip("/")
    folder = root if name in ("", ".") else f"{root}/{name}"
    return visible_entries(storage, folder) if storage.is_folder(folder) else entries


def class_like(entries: Entries) -> Entries:
    """Folders and class tars: what may be a split or a class."""
    return {
        name: entry
        for name, entry in entries.items()
        if entry["type"] == "directory" or names.is_class_tar(name)
    }


def _entries_of_kind(storage: Storage, folder: str, layout: str) -> tuple[list[Entry], list[str]]:
    """The class folders, or the class tars, in a folder; and a note about what is not used."""
    entries = class_like(visible_entries(storage, folder))
    kind = "file" if layout == "class_tars" else "directory"
    of_kind = [entry for entry in entries.values() if entry["type"] == kind]
    named: dict[str, str] = {}
    for entry in of_kind:
        path = entry["name"].rstrip("/")
        _require_text(path)
        other = named.setdefault(names.class_name(posixpath.basename(path)), path)
        if other != path:
            raise DataError(
                f"two names of one class, written with other bytes: {other} and {path}",
                place=storage.shown(folder),
                remedy="merge them, or rename one",
            )
    others = [name for name in entries if names.class_name(name) not in named]
    note = f"not used beside the classes in {folder}: {', '.join(others)}"
    return of_kind, [note] if others and of_kind else []


def _require_text(path: str) -> None:
    """Raise DataError for a name that cannot be written: its bytes are no UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise DataError(
            "the name of a class is no text in UTF-8",
            place=path.encode("utf-8", "backslashreplace").decode(),
            remedy="rename it; for many names, see the program convmv",
        ) from None


def _parts_of_all(
    find: PartFinder, storage: Storage, folder: str, entries: list[Entry]
) -> Iterable[ClassParts]:
    """The parts of each tar or folder, in order.

    Requests to a remote store overlap; their results keep the order.
    """

    def find_in(entry: Entry) -> ClassParts:
        return find(storage, f"{folder}/{posixpath.basename(entry['name'].rstrip('/'))}", entry)

    with ThreadPoolExecutor(1 if storage.is_local else CONCURRENT_REQUESTS) as pool:
        yield from pool.map(find_in, entries)


def _is_labelled(parts_of: dict[SplitName, list[Part]], split: SplitName) -> bool:
    """True for training images, and for a split that has a class in common with them."""
    trained = {part.group for name in ("train", "") for part in parts_of.get(name, ())}
    groups = {part.group for part in parts_of.get(split, ())}
    return split in ("train", "") or not trained or bool(trained & groups)


def _without_labels(
    storage: Storage,
    root: str,
    config: SourceConfig,
    division: Division,
    parts_of: dict[SplitName, list[Part]],
) -> tuple[dict[SplitName, str], list[str]]:
    """Take the splits without class folders out of ``parts_of``.

    The images of a competition's test set lie together in one folder, which is no class: without
    labels, it is not used.

    Returns:
        The file with the labels of each split that has one, and notes for the user.

    Raises:
        DataError: a validation folder has no labels, or one that the job names.
    """
    flat: dict[SplitName, str] = {}
    notes: list[str] = []
    for split, folder in division.splits.items():
        if _is_labelled(parts_of, split):
            continue
        name = folder.removeprefix(root).lstrip("/")
        groups = sorted({part.group for part in parts_of.pop(split)})
        labels = labels_file(storage, root, folder) if split == "validation" else None
        like = split_like(name)
        if labels is not None:
            flat[split] = labels
        elif config.splits is None and like is not None and like.split == "test":
            notes.append(
                f"{name} is not used: its images have no labels (none of the other classes)"
            )
        else:
            inside = f"only {', '.join(groups[:5])}" if groups else "no class at all"
            raise DataError(
                f"{name} has no class in common with the training images: it has {inside}",
                place=config.root,
                remedy=f"sort the images of {name} by class, put {TINY_LABELS} or {KAGGLE_LABELS} "
                "into it, or set `splits` without it",
            )
    return flat, notes
