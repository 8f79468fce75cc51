"""The classes of a source, in the order of labels."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from typing import Any

from pipeline.errors import DataError
from pipeline.sources.class_lists import class_list, class_names
from pipeline.sources.remote import Storage
from pipeline.sources.source_config import SourceConfig


def names_in(storage: Storage, folder: str) -> dict[str, dict[str, Any]]:
    """Entries of a folder by name, hidden ones and litter aside."""
    entries = {
        posixpath.basename(entry["name"].rstrip("/")): entry for entry in storage.entries(folder)
    }
    return {name: entries[name] for name in sorted(entries) if not name.startswith((".", "__"))}


def ordered_classes(
    storage: Storage, root: str, config: SourceConfig, found: Sequence[str]
) -> list[tuple[str, str]]:
    """(id, name) in label order: the configured list, the root's synsets.txt, or those found, as they come."""
    own: dict[str, str] = {}
    if storage.info(f"{root}/synsets.txt"):
        lines = storage.read(f"{root}/synsets.txt").decode("utf-8").splitlines()
        own = {
            words[0]: " ".join(words[1:])
            for line in lines
            if (words := line.split()) and not words[0].startswith("#")
        }
    listed = (
        class_list(config.classes)
        if config.classes != "auto"
        else list(own) or list(dict.fromkeys(found))
    )
    unknown = sorted(set(found) - set(listed))
    if unknown:
        name = config.classes if config.classes != "auto" else "synsets.txt"
        raise DataError(
            f"{len(unknown)} classes of the source are not in the class list {name}: {', '.join(unknown[:5])}",
            place=config.root,
            remedy="classes: auto, another list, or take them away",
        )
    if len(listed) < 2:
        raise DataError(
            f"has {len(listed)} class: nothing to tell apart",
            place=config.root,
            remedy="two classes or more",
        )
    known = class_names()
    return [(one, own.get(one) or known.get(one, one)) for one in listed]
