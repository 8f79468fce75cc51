"""Describes a folder that has no layout of a source: what lies there, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from pipeline.errors import DataError
from pipeline.sources.class_order import visible_entries
from pipeline.sources.image_kinds import INSTALL_HEIF, can_read_heif
from pipeline.sources.layout import Entries
from pipeline.sources.names import (
    ARCHIVE_SUFFIXES,
    HEIF_SUFFIXES,
    is_image,
    is_litter,
    may_be_image,
    suffix_of,
)
from pipeline.sources.remote import Storage
from pipeline.sources.source_config import SourceConfig

_DEEPEST = 4  # folders below the root that are looked into
_MOST_FILES = 2000  # files that are counted
_KINDS = 3  # endings that a message names
_TABLES = frozenset({".parquet", ".arrow"})


def require_classes(
    storage: Storage,
    root: str,
    config: SourceConfig,
    folders: Iterable[str],
    classes: Sequence[str],
) -> None:
    """Raise DataError if a source holds no class, or one that is the folder of the classes.

    Args:
        folders: of the splits, or the root.
        classes: those that the survey has.
    """
    folder = next(iter(folders))
    if classes:
        # A class of one folder with images in folders may be a step too high: data/{cat,dog}.
        inside = f"{folder}/{classes[0]}"
        deeper = class_root(storage, inside, depth=1) if storage.is_folder(inside) else ""
        if deeper and folder == root:
            raise _one_step_deeper(storage, root, deeper)
        return
    raise describe(storage, root, config)


def require_not_deeper(storage: Storage, root: str) -> None:
    """Raise DataError if only one of the folders in the root holds the folders of the classes."""
    deeper = class_root(storage, root)
    if deeper and deeper != root:
        raise _one_step_deeper(storage, root, deeper)


def describe(storage: Storage, root: str, config: SourceConfig) -> DataError:
    """The error about a source without a layout: what lies there, and what to do about it.

    Raises:
        DataError: the same, if the classes lie in a folder below.
    """
    require_not_deeper(storage, root)
    kinds: Counter[str] = Counter()
    _count(storage, root, kinds, depth=0)
    seen = ", ".join(
        f"{count} files {kind or 'without ending'}" for kind, count in kinds.most_common(_KINDS)
    )
    wanted = {"class_tars": "tars", "class_folders": "folders of images"}.get(config.layout)
    cause = f"holds no {wanted}" if wanted else "holds no images in a layout that is known"
    return DataError(
        f"{cause}; it has {seen or 'no files'}",
        place=storage.shown(root),
        remedy=_remedy(storage, root, kinds),
    )


def unreadable(storage: Storage, root: str, names: Sequence[str]) -> DataError:
    """The error about a source whose images no decoder knows. ``names``: of some of its files."""
    kinds = Counter(suffix_of(name) for name in names)
    seen = ", ".join(f"{kind or 'without ending'}" for kind, _ in kinds.most_common(_KINDS))
    return DataError(
        f"none of {len(names)} files that were looked into is an image that can be read ({seen})",
        place=storage.shown(root),
        remedy=_remedy(storage, root, kinds),
    )


def class_root(storage: Storage, folder: str, depth: int = 0) -> str:
    """The folder at or below ``folder`` that holds two or more folders of images; '' if none."""
    entries = visible_entries(storage, folder)
    below = [f"{folder}/{name}" for name, entry in entries.items() if _is_folder(entry["type"])]
    if _has_images(entries):
        return ""
    if sum(_has_images(visible_entries(storage, path)) for path in below[:_KINDS]) > 1:
        return folder
    if len(below) > 1 and depth and any(class_root(storage, path, _DEEPEST) for path in below[:2]):
        return folder  # of train/ and val/, for example
    # Of several folders (images/, annotations/), the only one with classes.
    if depth < _DEEPEST:
        deeper = [
            path for name in below[:_DEEPEST] if (path := class_root(storage, name, depth + 1))
        ]
        return deeper[0] if len(deeper) == 1 else ""
    return ""


def _is_folder(kind: str) -> bool:
    return kind == "directory"


def _has_images(entries: Entries) -> bool:
    return any(is_image(name) and not _is_folder(entry["type"]) for name, entry in entries.items())


def _one_step_deeper(storage: Storage, root: str, deeper: str) -> DataError:
    return DataError(
        f"the folders of the classes lie deeper, in {deeper.removeprefix(root).lstrip('/')}",
        place=storage.shown(root),
        remedy=f"--set data.root={storage.shown(deeper)}",
    )


def _count(storage: Storage, folder: str, kinds: Counter[str], depth: int) -> None:
    """Count the files below a folder by their ending."""
    entries = visible_entries(storage, folder)
    kinds.update(
        suffix_of(name)
        for name, entry in entries.items()
        if not _is_folder(entry["type"]) and not is_litter(name)
    )
    for name, entry in entries.items():
        if _is_folder(entry["type"]) and depth < _DEEPEST and kinds.total() < _MOST_FILES:
            _count(storage, f"{folder}/{name}", kinds, depth + 1)


def _remedy(storage: Storage, root: str, kinds: Counter[str]) -> str:
    """What to do about the commonest kind of file that explains why nothing can be read."""
    for kind, _ in kinds.most_common():
        if kind in HEIF_SUFFIXES and not can_read_heif():
            return f"convert them to JPEG, or install their decoder: {INSTALL_HEIF}"
        if kind in ARCHIVE_SUFFIXES:
            return "unpack the archives into one folder per class"
        if kind == ".tar":
            return "unpack the archives; tars that can be read hold the images of one class each"
        if kind in _TABLES:
            return "set layout: huggingface, and `root` to the folder of these files"
        if may_be_image(f"x{kind}") and not is_image(f"x{kind}"):
            return "convert the images to JPEG or PNG"
    if _has_images(visible_entries(storage, root)):
        return "put the images of each class into a folder, or give the folder above as `root`"
    return (
        "provide class tars or class folders (at the top, or below train/ and val/), "
        "or set `layout`"
    )
