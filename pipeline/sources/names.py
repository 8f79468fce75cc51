"""Names in a source folder: split folders, image files, class archives and litter.

Every module that looks into a source uses these rules. Two modules with rules of their own would
disagree about the same folder: one prepares ``training/`` and another does not notice that it
changed.

A folder of class tars (or class folders) looks like this:

    train/n01440764.tar         class "n01440764"; the folder may also be called "training"
    val/n01440764.tar           optional; also "validation" or "valid"
    test/n01440764.tar          optional
    train/._n01440764.tar       skipped: written by macOS beside every copied file
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

# Of each tuple, the first name that exists wins. ``splits.choose_splits`` decides what a source
# with some of them is divided into.
TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "validation", "valid")
TEST_NAMES = ("test",)
SPLIT_NAMES = TRAIN_NAMES + VALIDATION_NAMES + TEST_NAMES

CLASS_TAR_SUFFIX = ".tar"
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
)

_LITTER_FILES = frozenset({".ds_store", "thumbs.db", "desktop.ini"})
_RESOURCE_FORK = "._"  # macOS keeps a file's metadata in a second file with this prefix


def first_present(candidates: Sequence[str], names: Iterable[str]) -> str | None:
    """The first of ``candidates`` that is among ``names``; None if there is none.

    Example: ``first_present(VALIDATION_NAMES, ["valid", "val", "train"])`` is "val".
    """
    present = set(names)
    return next((name for name in candidates if name in present), None)


def is_image(name: str) -> bool:
    """True if a file name ends like an image.

    Only estimates use this: preparation looks at the bytes.
    """
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_class_tar(name: str) -> bool:
    return name.endswith(CLASS_TAR_SUFFIX)


def class_of_tar(name: str) -> str:
    """The class of a class tar: "n01440764.tar" -> "n01440764"."""
    return name.removesuffix(CLASS_TAR_SUFFIX)


def is_hidden(name: str) -> bool:
    """True for entries that are never a class or a split: ".git", "._n01.tar", "__MACOSX"."""
    return name.startswith((".", "__"))


def is_litter(name: str) -> bool:
    """True for files that operating systems leave in folders and archives, such as ".DS_Store"."""
    lower = name.lower()
    return lower in _LITTER_FILES or lower.startswith(_RESOURCE_FORK)
