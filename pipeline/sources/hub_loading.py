"""Loads Hugging Face datasets on disk, in a store or on the hub.

``datasets`` is imported inside functions: it takes seconds to import, and most jobs never need it.
Its objects have no types that can be checked, so the few members used here are written down as
protocols.
"""

from __future__ import annotations

import functools
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from pipeline.errors import DataError
from pipeline.sources.folder_files import folder_files
from pipeline.sources.remote import open_storage, without_secrets
from pipeline.sources.split_names import split_like

if TYPE_CHECKING:
    import pyarrow

SAVED_FILES = ("dataset_dict.json", "state.json")  # save_to_disk writes one of them
_LFS_POINTER = b"version https://git-lfs"
_PATTERN_SIGNS = frozenset("[]*?")
_LOOKED_AT = 8  # files


class HubSplit(Protocol):
    """The members of ``datasets.Dataset`` that are used here."""

    column_names: list[str]
    features: Mapping[str, object]
    data: pyarrow.Table
    _fingerprint: str

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Mapping[str, object]: ...
    def cast_column(self, column: str, feature: object) -> HubSplit: ...


HubDataset = Mapping[str, HubSplit]


@functools.lru_cache(maxsize=4)
def load(root: str) -> HubDataset:
    """The splits of a dataset by name. Raises DataError."""
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = _load_remote(root) if "://" in root else _load_local(root)
    except Exception as error:  # its readers raise whatever they meet in a damaged file
        raise cannot_load(root, error) from None
    is_dict = isinstance(loaded, dict)  # DatasetDict; a single Dataset has no splits
    return cast("HubDataset", loaded if is_dict else {"train": loaded})


def cannot_load(root: str, error: Exception) -> DataError:
    """The error about a dataset that `datasets` cannot load."""
    folder = Path(root)
    files = sorted(folder.rglob("*.parquet")) if folder.is_dir() else []
    if any(_is_lfs_pointer(file) for file in files[:_LOOKED_AT]):
        return DataError(
            "its files are pointers of Git LFS", place=root, remedy=f"git -C {root} lfs pull"
        )
    text = without_secrets(str(error)) or type(error).__name__
    if folder.is_dir() and _PATTERN_SIGNS & set(root):
        return DataError(
            f"`datasets` cannot load it: {text}",
            place=root,
            remedy="rename the folder without [ ] * ?, which `datasets` takes for patterns",
        )
    return DataError(
        f"`datasets` cannot load it: {text}",
        place=without_secrets(root),
        remedy="give a folder of Parquet files or images, a folder that save_to_disk wrote, "
        "or a dataset's name on the hub",
    )


def _load_local(root: str) -> object:
    import datasets

    if is_saved(Path(root)):
        return cast("object", datasets.load_from_disk(root))
    return cast("object", datasets.load_dataset(root))


def _load_remote(root: str) -> object:
    """Load a folder that save_to_disk wrote, or Parquet files such as "train-00000.parquet"."""
    import datasets

    storage, path = open_storage(root)
    files = [name for name, _ in folder_files(storage, path).files]
    if any(f"{path}/{name}" in files for name in SAVED_FILES):
        return cast("object", datasets.load_from_disk(root))
    files_of: dict[str, list[str]] = {}
    for file in files:
        if file.endswith(".parquet"):
            prefix = re.split(r"[-_.]", posixpath.basename(file))[0].lower()
            split = prefix if split_like(prefix) is not None else "train"
            files_of.setdefault(split, []).append(storage.fs.unstrip_protocol(file))
    return cast("object", datasets.load_dataset("parquet", data_files=files_of))


def _is_lfs_pointer(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(len(_LFS_POINTER)) == _LFS_POINTER


def is_saved(folder: Path) -> bool:
    """True for a folder that save_to_disk wrote."""
    return any((folder / name).is_file() for name in SAVED_FILES)
