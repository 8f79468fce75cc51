"""A prepared dataset as training reads it: mapped shards, each image a slice of the file, nothing copied.

On disk: ``dataset.json`` (fingerprint, splits and shards with their digests), ``classes.json`` (index, id and name of each
class) and the shards with their indexes (`pipeline.data.shards`). The same files in a remote store are read through a cache
on the node (`pipeline.data.shard_cache`).
"""

from __future__ import annotations

import bisect
import errno
import json
import mmap
import resource
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.data.shard_cache import CachedShards, ShardCache
from pipeline.data.shards import FORMAT, INDEX_ROWS, index_path
from pipeline.errors import DataError
from pipeline.files import file_digest
from pipeline.layout import CLASSES_JSON, DATASET_JSON

AGAIN = "run the prepare stage again (it makes only what is missing)"


class Content(Protocol):
    """The bytes of a shard, to be sliced."""

    def __getitem__(self, span: slice, /) -> memoryview: ...


class Files(Protocol):
    """Where a dataset's files are: in a `Folder`, or elsewhere and cached (`CachedShards`); ``shards``: as dataset.json
    describes them."""

    place: str

    def read(self, name: str) -> bytes:
        """A small file. Raises FileNotFoundError."""

    def open(
        self, shards: Sequence[dict[str, Any]]
    ) -> tuple[Sequence[Content], Sequence[NDArray[np.int64]]]:
        """Contents and indexes. Raises DataError where one is missing or is not what was written."""

    def ahead(self, shards: Iterable[dict[str, Any]]) -> None:
        """These will be needed next."""


class Split:
    """The images of one split, by number; safe to read from many threads."""

    def __init__(self, name: str, files: Files, shards: list[dict[str, Any]]) -> None:
        self.name, self.directory = name, files.place
        self._source, self._shards = files, shards
        _allow_open_files(2 * len(shards))
        self._maps, self._indexes = files.open(shards)
        self._starts = [0, *np.cumsum([shard["rows"] for shard in shards]).tolist()]
        empty: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.labels: NDArray[np.int64] = np.concatenate(
            [index[2] for index in self._indexes] or [empty]
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def image(self, i: int) -> memoryview:
        """The encoded bytes of image ``i``, a view of the mapped file. Raises DataError if they are not what was written."""
        shard, row = self._find(i)
        offset, length, _, expected = self._indexes[shard][:, row].tolist()
        image = self._maps[shard][offset : offset + length]
        if xxhash.xxh3_64_intdigest(image) != expected & (1 << 64) - 1:
            raise DataError(
                "the image is not what was written",
                place=self.place(i),
                remedy=f"delete the shard, and {AGAIN}",
            )
        return image

    def place(self, i: int) -> str:
        """File and row of image ``i``, for messages."""
        shard, row = self._find(i)
        return f"{self.directory}/{self._shards[shard]['file']}, row {row}"

    def ahead(self, shards: Iterable[int]) -> None:
        """The shards of these numbers are needed next: remote ones are fetched meanwhile, in this order."""
        self._source.ahead(self._shards[number] for number in shards)

    def _find(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)} in split {self.name}")
        shard = bisect.bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]


class PreparedDataset:
    """A prepared dataset: ``fingerprint``, ``classes`` (ids in index order), ``class_names``, and its splits.

    ``path``: its directory (within its store).
    """

    def __init__(
        self, path: Path, files: Files, description: dict[str, Any], classes: list[dict[str, Any]]
    ) -> None:
        self.path, self.description = path, description
        self.fingerprint: str = description["fingerprint"]
        self.classes: list[str] = [entry["id"] for entry in classes]
        self.class_names: list[str] = [entry["name"] for entry in classes]
        self._files = files
        self._splits: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """The split "train" or "validation"; its shards are opened and checked on first use.

        Raises:
            DataError: no such split, or a shard is missing, truncated or of another preparation.
        """
        if name not in self._splits:
            if name not in self.description["splits"]:
                raise DataError(
                    f"has no split named {name!r}", place=self._files.place, remedy=AGAIN
                )
            self._splits[name] = Split(
                name, self._files, self.description["splits"][name]["shards"]
            )
        return self._splits[name]


def open_dataset(
    path: Path | str,
    fingerprint: str | None = None,
    cache: ShardCache | None = None,
    whole: bool = True,
) -> PreparedDataset:
    """Open the prepared dataset in a directory, or behind a URL that fsspec knows (s3, memory, http ...).

    Local shards are mapped. Remote ones are fetched whole into ``cache``, checked against their digests and read from
    there::

        open_dataset("s3://bucket/imagenet", cache=ShardCache(Path("/scratch/shards"), max_bytes=500 << 30))

    A dataset that fits the cache is fetched in the background from the first use of a split; of a larger one, each shard
    when it is first read or announced (`Split.ahead`), in place of those least recently used. All processes of a node give
    the same directory and share it. Endpoint and keys come from the environment or fsspec's configuration.

    Args:
        whole: refuse a split of which a local shard is missing or cut; else this is told by whoever reads its images.
    Raises:
        DataError: nothing prepared there, or not with the expected ``fingerprint``, or a URL without a cache.
    """
    files: Files
    if isinstance(path, str) and "://" in path:
        if cache is None:
            remedy = "give open_dataset a ShardCache: a directory on this node, and how many bytes it may take"
            raise DataError(
                "is remote, and there is no cache to read it through", place=path, remedy=remedy
            )
        files = CachedShards(path, cache)
        path = files.root
    else:
        files = Folder(Path(path), whole)
    description = _read_json(files, DATASET_JSON)
    classes = _read_json(files, CLASSES_JSON)
    if description.get("format") != FORMAT:
        cause = f"has format {description.get('format')}, this version reads {FORMAT}"
        raise DataError(
            cause,
            place=files.place,
            remedy="prepare it again: the same command with --stage prepare --force",
        )
    if fingerprint is not None and description.get("fingerprint") != fingerprint:
        raise DataError(
            f"is another dataset: fingerprint {description.get('fingerprint')}, expected {fingerprint}",
            place=files.place,
            remedy="go on with the dataset the run was started with, or start a new run",
        )
    return PreparedDataset(Path(path), files, description, classes)


def _allow_open_files(more: int) -> None:
    """Maps keep their files open, and the usual limit is 1024: it is raised by so many, as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        limit = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _unreadable(path: Path, error: OSError) -> DataError:
    remedy = (
        "raise the limit of open files (ulimit -n): two a shard"
        if error.errno == errno.EMFILE
        else AGAIN
    )
    return DataError(f"cannot be read: {error.strerror}", place=str(path), remedy=remedy)


def _read_json(files: Files, name: str) -> Any:
    try:
        return json.loads(files.read(name))
    except FileNotFoundError:
        raise DataError(
            f"no prepared dataset here ({name} is missing)", place=files.place, remedy=AGAIN
        ) from None
    except ValueError as error:
        raise DataError(
            f"is damaged: {error}", place=f"{files.place}/{name}", remedy=AGAIN
        ) from None


class Folder:
    """A dataset's files in a local directory."""

    def __init__(self, path: Path, whole: bool) -> None:
        self.path, self.place, self.whole = path, str(path), whole

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def open(
        self, shards: Sequence[dict[str, Any]]
    ) -> tuple[list[Content], list[NDArray[np.int64]]]:
        return [self._content(shard) for shard in shards], [
            _read_index(self.path, shard) for shard in shards
        ]

    def _content(self, shard: dict[str, Any]) -> Content:
        try:
            return _map_shard(self.path, shard)
        except DataError as error:
            if self.whole:
                raise
            return _Damaged(error)

    def ahead(self, shards: Iterable[dict[str, Any]]) -> None:
        """Nothing to do: they are mapped."""


class _Damaged:
    """Content of a shard that is missing or cut: told by whoever reads one of its images."""

    def __init__(self, error: DataError) -> None:
        self.error = error

    def __getitem__(self, span: slice, /) -> memoryview:
        raise self.error


class _Mapped:
    """Content of a mapped shard. Its size is asked for at each slice, which costs less than a microsecond: the kernel ends a
    process (SIGBUS) that touches a page of which a cut has taken the file away."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.view = path, content, memoryview(content)

    def __getitem__(self, span: slice, /) -> memoryview:
        if (size := self.content.size()) < span.stop:
            raise _cut(self.path, size, len(self.view))
        return self.view[span]


def _cut(path: Path, size: int, expected: int) -> DataError:
    return DataError(f"has {size} bytes instead of {expected}", place=str(path), remedy=AGAIN)


def _map_shard(directory: Path, shard: dict[str, Any]) -> _Mapped:
    path = directory / shard["file"]
    try:
        with open(path, "rb") as file:
            if (size := file.seek(0, 2)) != shard["bytes"]:
                raise _cut(path, size, shard["bytes"])
            return _Mapped(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_index(directory: Path, shard: dict[str, Any]) -> NDArray[np.int64]:
    path = index_path(directory / shard["file"])
    try:
        matches = file_digest(path) == shard["index_digest"]
        index: NDArray[np.int64] = (
            np.load(path, mmap_mode="r", allow_pickle=False)
            if matches
            else np.zeros((0, 0), np.int64)
        )
    except OSError as error:
        raise _unreadable(path, error) from error
    if not matches or index.shape != (INDEX_ROWS, shard["rows"]):
        raise DataError(
            "does not belong to this dataset (its digest differs)", place=str(path), remedy=AGAIN
        )
    return index
