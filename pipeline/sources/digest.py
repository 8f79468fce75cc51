"""Digest of a source folder: tells a finished preparation whether its source has changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import xxhash

from pipeline.files import json_digest
from pipeline.sources.source_config import SourceConfig


def source_digest(config: SourceConfig) -> str | None:
    """Digest of name, size and time of the last change of every file; None without a root.

    Reads no file. A file that is written in place, with as many bytes, has another time.

    A remote source and a dataset of the Hugging Face hub have no such times: their digest is that
    of the address.
    """
    # A name on the hub looks like a relative path ("user/dataset"), so test whether it exists.
    root = Path(config.root)
    if "://" in config.root or (config.layout == "huggingface" and not root.exists()):
        return json_digest(config.root)
    if not root.exists():
        return None
    digest = xxhash.xxh3_128()
    for line in _entries(str(root), "", (os.path.realpath(root),)):
        # A name may not be UTF-8; surrogates stand for its odd bytes.
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _entries(folder: str, above: str, real_paths: tuple[str, ...]) -> Iterator[str]:
    """A line for every file below a folder, in the order of the names.

    Args:
        above: path of the folder from the root.
        real_paths: of the folders down to this one, to end at a link that leads back.
    """
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        yield f"{above}\0unreadable\n"  # the survey reports it
        return
    for entry in inside:
        path = f"{above}/{entry.name}"
        try:
            status = entry.stat()  # of a link's target
            is_folder = entry.is_dir()
        except OSError:
            yield f"{path}\0broken\n"
            continue
        if not is_folder:
            yield f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n"
            continue
        # An empty folder is a class as well.
        yield f"{path}/\n"
        real = os.path.realpath(entry.path) if entry.is_symlink() else entry.name
        real = os.path.join(real_paths[-1], real)
        if not any(f"{outer}/".startswith(f"{real}/") for outer in real_paths):
            yield from _entries(entry.path, path, (*real_paths, real))
