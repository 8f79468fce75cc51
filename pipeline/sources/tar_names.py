"""The names of the first files in a tar, which tell what kind of archive it is."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Sequence
from itertools import islice

from pipeline.errors import DataError
from pipeline.sources.names import class_of_tar, is_class_tar, is_litter, may_be_image
from pipeline.sources.remote import HEADER_BLOCK, Storage
from pipeline.sources.split_names import means_nothing

_FIRST = 500  # files whose names are read
_FEW = 3  # tars: more of them are rather classes than parts of one dataset


def first_names(storage: Storage, path: str, size: int, most: int = _FIRST) -> list[str]:
    """Names of at most ``most`` files, litter left out; fewer if the tar is damaged."""
    names: list[str] = []
    try:
        with (
            storage.open(path, 0, size, HEADER_BLOCK) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            for member in islice(tar, most):
                if member.isfile() and not is_litter(member.name):
                    names.append(member.name)
    except (tarfile.TarError, EOFError):
        pass  # preparation reports the damage
    return names


def require_one_class_each(storage: Storage, tars: Sequence[tuple[str, int]]) -> None:
    """Raise DataError for archives of whole datasets. ``tars``: (path, bytes)."""
    for path, size in tars[:_FEW]:
        names = first_names(storage, path, size)
        place = storage.shown(path)
        if names and all(map(is_class_tar, names)):
            raise DataError(
                f"is an archive of {len(names)} or more archives, such as {names[0]}",
                place=place,
                remedy="unpack it once: a folder of class tars is a layout that can be read",
            )
        folders = {posixpath.dirname(name) for name in names if may_be_image(name)}
        # Images beside the folders, or a folder of the tar's name, belong to a tar of one class.
        stem = class_of_tar(posixpath.basename(path))
        is_one = folders & {"", "."} or (
            not means_nothing(stem) and any(stem in folder.split("/") for folder in folders)
        )
        if len(folders) > 1 and not is_one and len(tars) <= _FEW:
            raise DataError(
                f"holds folders of several classes: {', '.join(sorted(folders)[:_FEW])}",
                place=place,
                remedy="unpack it: one folder per class is a layout that can be read",
            )
