"""The classes of a source, in the order of the labels."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from pipeline.errors import DataError
from pipeline.sources.class_lists import class_list, class_names
from pipeline.sources.names import is_hidden
from pipeline.sources.remote import Entry, Storage
from pipeline.sources.source_config import SourceConfig

SYNSETS_FILE = "synsets.txt"  # one class per line: ID, then an optional readable name


def visible_entries(storage: Storage, folder: str) -> dict[str, Entry]:
    """The entries of a folder by name, sorted; hidden ones are left out."""
    entries = {
        posixpath.basename(entry["name"].rstrip("/")): entry for entry in storage.entries(folder)
    }
    return {name: entries[name] for name in sorted(entries) if not is_hidden(name)}


def ordered_classes(
    storage: Storage, root: str, config: SourceConfig, present: Sequence[str]
) -> list[tuple[str, str]]:
    """(id, readable name) of each class; the position in the list is the label.

    The order is that of the configured list; otherwise that of the root's synsets.txt; otherwise
    that of ``present``, the classes that the source has.

    Raises:
        DataError: the source has classes that the list lacks, or there are fewer than two classes
            (D5).
    """
    own_names = _read_synsets(storage, root)
    if config.classes != "auto":
        ids = class_list(config.classes)
    else:
        ids = list(own_names) or list(dict.fromkeys(present))
    # A class without a label cannot be trained on. Classes of the list without images are fine:
    # ImageNet-22K has lists with empty classes, and their labels must keep their places.
    unknown = sorted(set(present) - set(ids))
    if unknown:
        list_name = config.classes if config.classes != "auto" else SYNSETS_FILE
        raise DataError(
            f"{len(unknown)} classes of the source are not in the class list {list_name}: "
            f"{', '.join(unknown[:5])}",
            place=config.root,
            remedy="set classes: auto, choose another list, or remove these classes",
        )
    if len(ids) < 2:
        raise DataError(
            f"has {len(ids)} class: nothing to tell apart",
            place=config.root,
            remedy="provide at least two classes",
        )
    shipped_names = class_names()
    return [(wnid, own_names.get(wnid) or shipped_names.get(wnid, wnid)) for wnid in ids]


def _read_synsets(storage: Storage, root: str) -> dict[str, str]:
    """Readable name by ID from the root's synsets.txt, in its order; empty without such a file."""
    path = f"{root}/{SYNSETS_FILE}"
    if not storage.info(path):
        return {}
    names: dict[str, str] = {}
    for line in storage.read(path).decode("utf-8").splitlines():
        words = line.split()
        if words and not words[0].startswith("#"):
            names[words[0]] = " ".join(words[1:])
    return names
