"""All files below a folder, links included: the one order in which survey and reader see them.

cat/1.jpg
cat/more/2.jpg
cat/old -> /store/cats      followed, as if its files lay here
cat/up -> ..                a loop: named and not followed
cat/3.jpg -> /gone.jpg      a broken link: one file that cannot be read
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.sources.remote import Entry, Storage

NOT_A_FILE = -1  # in place of the size: a broken link, a pipe, a device
LISTED = 20  # paths that an error names


@dataclass(frozen=True, kw_only=True)
class FolderFiles:
    """The files below a folder.

    ``files``: (path, bytes or NOT_A_FILE), sorted by path. ``loops``: links that lead to a folder
    around them. ``refused``: files and folders that this user may not read.
    """

    files: list[tuple[str, int | None]] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def folder_files(storage: Storage, folder: str, *, check_access: bool = False) -> FolderFiles:
    """Every file below a folder.

    Args:
        check_access: look for local files that this user may not read.
    """
    result = FolderFiles()
    real = os.path.realpath(folder) if storage.is_local else folder
    _walk(storage, folder, (real,), result, check_access)
    result.files.sort()
    return result


def _walk(
    storage: Storage, folder: str, above: tuple[str, ...], result: FolderFiles, check_access: bool
) -> None:
    """Add the files of a folder. ``above``: the real paths of the folders down to this one."""
    if check_access and storage.is_local and not os.access(folder, os.R_OK | os.X_OK):
        result.refused.append(folder)
        return
    for entry in storage.entries(folder):
        path = entry["name"].rstrip("/")
        if storage.is_local and entry["type"] not in ("file", "directory"):
            result.files.append((path, NOT_A_FILE))
        elif entry["type"] != "directory":
            result.files.append((path, entry["size"]))
            if check_access and storage.is_local and not os.access(path, os.R_OK):
                result.refused.append(path)
        elif path != folder:  # some stores list a folder inside itself
            real = f"{above[-1]}/{path.rsplit('/', 1)[-1]}"
            if entry.get("islink"):
                real = os.path.realpath(path)
            if any(f"{outer}/".startswith(f"{real}/") for outer in above):
                result.loops.append(path)
            else:
                _walk(storage, path, (*above, real), result, check_access)


def require_access(refused: list[str]) -> None:
    """Raise a DataError that names files and folders of the source that cannot be read."""
    if not refused:
        return
    listed = "\n".join(f"    {path}" for path in sorted(refused)[:LISTED])
    others = f"\n    and {len(refused) - LISTED} more" if len(refused) > LISTED else ""
    raise DataError(
        f"{len(refused)} files or folders of the source may not be read:\n{listed}{others}",
        remedy="give this user the right to read them (chmod), or move them out of the source",
    )


def with_target(entry: Entry) -> Entry:
    """An entry of a local folder; a link counts as the file or folder that it leads to.

    The type of a link that leads to nothing, or to itself, is "broken".
    """
    if not entry.get("islink"):
        return entry
    try:
        mode = os.stat(entry["name"]).st_mode
    except OSError:
        return {**entry, "type": "broken"}
    kind = "directory" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"
    return {**entry, "type": kind}
