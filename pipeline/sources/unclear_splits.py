"""Sources whose top folders may be splits or classes: the user has to decide.

train/1.jpg, car/1.jpg             a class that is called like a split
train/steam/1.jpg, car/van/1.jpg   the same, with folders inside of the classes
cat/1.jpg, dog/1.jpg, test/1.jpg   the same; or images for a test, without labels
old/cat/1.jpg, new/cat/1.jpg       top folders that hold the same folders
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.sources import contents
from pipeline.sources.class_order import visible_entries
from pipeline.sources.layout import Entries
from pipeline.sources.names import class_of_tar, may_be_image
from pipeline.sources.remote import Storage
from pipeline.sources.split_names import split_like
from pipeline.sources.units import SplitName

_COMPARED = 32  # top folders that are looked into, at most
_NAMED = 6  # folders that the error names


@dataclass(frozen=True)
class _Inside:
    """What lies directly in a top folder."""

    folders: frozenset[str]
    has_images: bool


def require_clear(
    storage: Storage, root: str, entries: Entries, splits: Mapping[SplitName, str]
) -> None:
    """Raise DataError if it is unclear which top folders are splits.

    Args:
        entries: of the root: folders and class tars.
        splits: the names that are taken for splits; {"": ""} if none is.
    """
    named = [name for name in entries if (like := split_like(name)) is not None and like.is_plain]
    others = [name for name in entries if name not in splits.values()]
    archives = [name for name in splits.values() if name and entries[name]["type"] != "directory"]
    folders = [name for name in entries if entries[name]["type"] == "directory"]
    is_whole = splits == {"": ""}
    if archives and not others:
        raise DataError(
            f"{', '.join(archives)}: archives of whole splits cannot be read",
            place=storage.shown(root),
            remedy=f"unpack them into folders: {', '.join(map(class_of_tar, archives))}",
        )
    if archives or (is_whole and named and len(entries) > len(named)):
        _raise_unclear(storage, root, [*named, *(name for name in entries if name not in named)])
    elif is_whole and len(folders) > 1:
        inside = {name: _look_into(storage, root, name) for name in folders[:_COMPARED]}
        _require_different_folders(inside, root, storage)
    elif len(splits) == 1 and not is_whole:
        others = [name for name in others if name in folders]
        _require_split(storage, root, next(iter(splits.values())), others)


def _require_split(storage: Storage, root: str, name: str, others: list[str]) -> None:
    """Raise DataError if the only folder with the name of a split looks like a class."""
    split = _look_into(storage, root, name)
    siblings = [_look_into(storage, root, other) for other in others[:_COMPARED]]
    # As a class, it would look like the others: images in it, or folders that no other has.
    if split.has_images:
        alike = any(sibling.has_images for sibling in siblings)
    else:
        alike = bool(split.folders) and any(
            sibling.folders and not sibling.has_images and not sibling.folders & split.folders
            for sibling in siblings
        )
    if alike:
        _raise_unclear(storage, root, [name, *others])


def _require_different_folders(inside: Mapping[str, _Inside], root: str, storage: Storage) -> None:
    """Raise DataError if the top folders hold nothing but folders, and mostly the same ones."""
    folders = [entry.folders for entry in inside.values()]
    if any(entry.has_images or len(entry.folders) < 2 for entry in inside.values()):
        return
    common = frozenset.intersection(*folders)
    # Two classes of the same names are enough to tell apart from images/ and thumbnails/.
    if 2 * len(common) >= min(map(len, folders)) and len(common) > 1:
        contents.require_not_deeper(storage, root)
        _raise_unclear(storage, root, list(inside))


def _look_into(storage: Storage, root: str, name: str) -> _Inside:
    entries = visible_entries(storage, f"{root}/{name}")
    folders = frozenset(key for key, entry in entries.items() if entry["type"] == "directory")
    has_images = any(
        entry["type"] != "directory" and may_be_image(key) for key, entry in entries.items()
    )
    return _Inside(folders, has_images)


def _is_train(name: str) -> bool:
    like = split_like(name)
    return like is not None and like.split == "train"


def _raise_unclear(storage: Storage, root: str, folders: Collection[str]) -> None:
    listed = ", ".join(list(folders)[:_NAMED]) + (", ..." if len(folders) > _NAMED else "")
    train = next((name for name in folders if _is_train(name)), "FOLDER")
    raise DataError(
        f"it is unclear which of its folders are splits and which are classes: {listed}",
        place=storage.shown(root),
        remedy="set the key `splits` of the dataset: --set "
        f"'data.splits={{train: {train}, validation: FOLDER}}'; "
        "or --set data.splits=none if each of these folders is a class",
    )
