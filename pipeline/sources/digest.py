"""Digest of a source folder: tells a finished preparation whether its source has changed."""

from __future__ import annotations

from pathlib import Path

from pipeline.files import json_digest
from pipeline.sources.names import SPLIT_NAMES
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.splits import named_splits

Entry = tuple[str, int, int]  # name, size (bytes; 0 for a folder), time of the last change (ns)


def source_digest(config: SourceConfig) -> str | None:
    """Digest of names, sizes and times in the root and its split folders; None without a root.

    Cheap for millions of images, because nothing below the class level is listed. An image that is
    added to a class folder or a class tar changes the time of that folder or tar:

        root/          listed (a)
        root/train/    listed (b)
        root/train/n1/ not listed; its time is part of (b) and changes with every file added

    A remote source and a dataset of the Hugging Face hub have no such times: their digest is that
    of the address.
    """
    # A name on the hub looks like a relative path ("user/dataset"), so test whether it exists.
    root = Path(config.root)
    if "://" in config.root or (config.layout == "huggingface" and not root.exists()):
        return json_digest(config.root)
    if not root.exists():
        return None
    return json_digest([_list_folder(folder) for folder in (root, *_split_folders(root, config))])


def _split_folders(root: Path, config: SourceConfig) -> list[Path]:
    """All split folders, also those that the survey ignores.

    A listing too many costs nothing. A listing too few leaves a change unnoticed.
    """
    folders = {
        path for path in root.iterdir() if path.is_dir() and path.name.lower() in SPLIT_NAMES
    }
    if config.splits is not None and not isinstance(config.splits, str):
        named = {root / name for name in named_splits(config.splits).values()}
        folders |= {path for path in named if path.is_dir()} - {root}
    return sorted(folders)


def _list_folder(folder: Path) -> list[Entry]:
    entries: list[Entry] = []
    for path in sorted(folder.iterdir()):
        status = path.stat()
        size = 0 if path.is_dir() else status.st_size
        entries.append((path.name, size, status.st_mtime_ns))
    return entries
