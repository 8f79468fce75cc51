"""A prepared dataset as training reads it: mapped shards, each image a slice of the file, nothing copied.

On disk: ``dataset.json`` (fingerprint, splits and shards with their digests), ``classes.json`` (index, id and name of each
class) and the shards with their indexes (`pipeline.data.shards`).
"""

from __future__ import annotations

import bisect
import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards import index_path
from pipeline.errors import DataError
from pipeline.files import file_digest

AGAIN = "run the prepare stage again (it makes only what is missing)"


class Split:
    """The images of one split, by number; safe to read from many threads."""

    def __init__(self, name: str, directory: Path, shards: list[dict[str, Any]]) -> None:
        self.name, self.directory = name, directory
        self._files = [str(shard["file"]) for shard in shards]
        self._maps = [_map_shard(directory, shard) for shard in shards]
        self._indexes = [_read_index(directory, shard) for shard in shards]
        self._starts = [0, *np.cumsum([shard["rows"] for shard in shards]).tolist()]
        empty: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.labels: NDArray[np.int64] = np.concatenate([index[2] for index in self._indexes] or [empty])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def image(self, i: int) -> memoryview:
        """The encoded bytes of image ``i``, a view of the mapped file."""
        shard, row = self._find(i)
        index = self._indexes[shard]
        offset = int(index[0, row])
        return self._maps[shard][offset : offset + int(index[1, row])]

    def place(self, i: int) -> str:
        """File and row of image ``i``, for messages."""
        shard, row = self._find(i)
        return f"{self.directory / self._files[shard]}, row {row}"

    def _find(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)} in split {self.name}")
        shard = bisect.bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]


class PreparedDataset:
    """A prepared dataset: ``fingerprint``, ``classes`` (ids in index order), ``class_names``, and its splits."""

    def __init__(self, path: Path, description: dict[str, Any], classes: list[dict[str, Any]]) -> None:
        self.path, self.description = path, description
        self.fingerprint: str = description["fingerprint"]
        self.classes: list[str] = [entry["id"] for entry in classes]
        self.class_names: list[str] = [entry["name"] for entry in classes]
        self._splits: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """The split "train" or "validation"; its shards are opened and checked on first use.

        Raises:
            DataError: no such split, or a shard is missing, truncated or of another preparation.
        """
        if name not in self._splits:
            if name not in self.description["splits"]:
                raise DataError(f"has no split named {name!r}", place=str(self.path), remedy=AGAIN)
            self._splits[name] = Split(name, self.path, self.description["splits"][name]["shards"])
        return self._splits[name]


def open_dataset(path: Path, fingerprint: str | None = None) -> PreparedDataset:
    """Open the prepared dataset in the directory ``path``.

    Raises:
        DataError: nothing prepared there, or not with the expected ``fingerprint``.
    """
    description = _read_json(path / "dataset.json", path)
    classes = _read_json(path / "classes.json", path)
    if fingerprint is not None and description.get("fingerprint") != fingerprint:
        raise DataError(
            f"is another dataset: fingerprint {description.get('fingerprint')}, expected {fingerprint}",
            place=str(path),
            remedy="go on with the dataset the run was started with, or start a new run",
        )
    return PreparedDataset(path, description, classes)


def _read_json(file: Path, directory: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise DataError(f"no prepared dataset here ({file.name} is missing)", place=str(directory), remedy=AGAIN) from None
    except ValueError as error:
        raise DataError(f"is damaged: {error}", place=str(file), remedy=AGAIN) from None


def _map_shard(directory: Path, shard: dict[str, Any]) -> memoryview:
    path = directory / shard["file"]
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size != shard["bytes"]:
                raise DataError(f"has {size} bytes instead of {shard['bytes']}", place=str(path), remedy=AGAIN)
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", place=str(path), remedy=AGAIN) from error


def _read_index(directory: Path, shard: dict[str, Any]) -> NDArray[np.int64]:
    path = index_path(directory / shard["file"])
    try:
        matches = file_digest(path) == shard["index_digest"]
        index: NDArray[np.int64] = np.load(path, mmap_mode="r", allow_pickle=False) if matches else np.zeros((3, 0), np.int64)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", place=str(path), remedy=AGAIN) from error
    if not matches or index.shape != (3, shard["rows"]):
        raise DataError("does not belong to this dataset (its digest differs)", place=str(path), remedy=AGAIN)
    return index
