"""Opens a prepared dataset and reads its images by sample number.

A dataset consists of ``dataset.json`` (fingerprint, splits, shards with their digests),
``classes.json`` (index, id and name of each class) and the shards with their indexes
(`pipeline.data.shards`). Local shards are memory-mapped (`pipeline.data.local_shards`); the shards
of a remote dataset go through a cache on the host (`pipeline.data.remote_shards`).

    split = open_dataset("runs/quickstart/stages/prepare/imagenet").split("train")
    image = split.image(1000)  # encoded bytes, for example a JPEG
    label = split.label(1000)
"""

from __future__ import annotations

import bisect
import copy
import json
import resource
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.data.description import DatasetDescription, UnsupportedFormat
from pipeline.data.local_shards import PREPARE_AGAIN, PREPARE_ANOTHER_FORMAT, LocalShards
from pipeline.data.remote_shards import RemoteShards
from pipeline.data.shard_cache import ShardCache
from pipeline.data.shards import Index, ShardInfo
from pipeline.errors import DataError
from pipeline.files import digest
from pipeline.layout import CLASSES_JSON, DATASET_JSON

UINT64 = (1 << 64) - 1


class ShardContent(Protocol):
    """The bytes of a shard, read by slicing: ``content[offset : offset + length]``."""

    def __getitem__(self, span: slice, /) -> memoryview: ...


class DatasetFiles(Protocol):
    """Access to a dataset's files: `LocalShards` or `RemoteShards`. ``place``: path or URL."""

    place: str

    def read(self, name: str) -> bytes:
        """Content of a small file. Raises FileNotFoundError."""

    def open(self, shards: Sequence[ShardInfo]) -> tuple[Sequence[ShardContent], Sequence[Index]]:
        """Contents and indexes of the shards. Raises DataError if a file is missing or damaged."""

    def prefetch(self, shards: Iterable[ShardInfo]) -> None:
        """Announce the shards that are needed next, most urgent first."""


@dataclass(frozen=True, kw_only=True)
class ClassEntry:
    """One class of ``classes.json``: WordNet ID or folder name, and the name for people."""

    id: str
    name: str


class Split:
    """The images of one split by sample number, 0 to len(split) - 1.

    Safe to read from many threads. ``labels``: int64, shape (len(split),). ``directory``: path or
    URL of the dataset.
    """

    def __init__(self, name: str, files: DatasetFiles, shards: Sequence[ShardInfo]) -> None:
        self.name = name
        self.directory = files.place
        self._files = files
        self._shards = shards
        _raise_open_files_limit(2 * len(shards))  # a shard and its index
        self._contents, self._indexes = files.open(shards)
        # _starts[k] is the first sample of shard k. Shards of 300, 300 and 100 rows give
        # [0, 300, 600, 700]; sample 650 is row 50 of shard 2.
        self._starts: list[int] = [0, *np.cumsum([shard.rows for shard in shards]).tolist()]
        empty = np.zeros(0, dtype=np.int64)
        self.labels = np.concatenate([index[2] for index in self._indexes] or [empty])

    def __len__(self) -> int:
        return self._starts[-1]

    def label(self, i: int) -> int:
        """Class index of sample ``i``."""
        return int(self.labels[i])

    def image(self, i: int) -> memoryview:
        """Encoded bytes of sample ``i``; a view of the mapped file if the dataset is local.

        Raises:
            IndexError: there is no sample ``i``.
            DataError: the shard cannot be read, or the image changed after preparation.
        """
        shard, row = self._locate(i)
        # The index alone locates the image: sample 650 of the example above is column 50 of the
        # index of shard 2. Parquet's own metadata is not needed.
        offset, length, _, expected = self._indexes[shard][:, row].tolist()
        image = self._contents[shard][offset : offset + length]
        # The index stores the hash as int64. The mask turns -1 back into 2**64 - 1, and so on.
        if xxhash.xxh3_64_intdigest(image) != expected & UINT64:
            raise DataError(
                "checksum mismatch: the image changed after preparation",
                place=self.place(i),
                remedy=PREPARE_AGAIN,
            )
        return image

    def place(self, i: int) -> str:
        """File and row of sample ``i``, for messages: ``set/train-00001.parquet, row 5``."""
        shard, row = self._locate(i)
        return f"{self.directory}/{self._shards[shard].file}, row {row}"

    def ahead(self, shards: Iterable[int]) -> None:
        """Prefetch the shards with these numbers, in this order; no effect on local datasets."""
        self._files.prefetch(self._shards[number] for number in shards)

    def relabelled(self, labels: NDArray[np.int64]) -> Split:
        """The same images, with ``labels[k]`` in place of label k; int64, shape (classes,)."""
        split = copy.copy(self)
        split.labels = labels[self.labels]
        return split

    def _locate(self, i: int) -> tuple[int, int]:
        """Shard and row of sample ``i``. Raises IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)} in split {self.name}")
        shard = bisect.bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]


class PreparedDataset:
    """A prepared dataset and its splits.

    ``path``: its directory (or the path within its store). ``classes``: class ids in index order.
    ``class_names``: their names.
    """

    def __init__(
        self,
        path: Path,
        files: DatasetFiles,
        description: DatasetDescription,
        classes: Sequence[ClassEntry],
    ) -> None:
        self.path = path
        self.description = description
        self.fingerprint = description.fingerprint
        self.classes = [entry.id for entry in classes]
        self.class_names = [entry.name for entry in classes]
        self._files = files
        self._splits: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """The split "train", "validation", or one that not every dataset has: "selection", "test".

        Opens and checks its shards on first use.

        Raises:
            DataError: there is no such split, or a shard is missing, truncated or damaged.
        """
        # Opening a split verifies the digests of its indexes and maps its shards, which takes
        # seconds for thousands of shards; so a split is opened on first use, and once.
        if name not in self._splits:
            if name not in self.description.splits:
                raise DataError(
                    f"has no split named {name!r}", place=self._files.place, remedy=PREPARE_AGAIN
                )
            shards = self.description.splits[name].shards
            self._splits[name] = Split(name, self._files, shards)
        return self._splits[name]


def open_dataset(
    path: Path | str,
    fingerprint: str | None = None,
    cache: ShardCache | None = None,
    whole: bool = True,
) -> PreparedDataset:
    """Open the prepared dataset in a directory or behind a URL of fsspec (s3, http, ...).

    Shards behind a URL are downloaded whole into ``cache``, verified, and read from there::

        open_dataset("s3://bucket/imagenet", cache=ShardCache(Path("/scratch"), 500 << 30))

    A dataset that fits into the cache is prefetched completely, starting when a split is opened. A
    larger one is downloaded shard by shard, when a shard is read or announced (`Split.ahead`), and
    replaces the least recently used shards. All processes of a host use the same cache directory.
    Endpoint and credentials come from the environment or fsspec's configuration.

    Args:
        fingerprint: the expected fingerprint; None accepts any.
        whole: refuse a split with a missing or truncated local shard. If false, only reading an
            image of that shard is an error.
    Raises:
        DataError: there is no prepared dataset, it is damaged, it has a different format or
            fingerprint, or ``path`` is a URL and there is no cache.
    """
    # 1. Where the files are. Nothing is read yet.
    files: DatasetFiles
    if isinstance(path, str) and "://" in path:
        if cache is None:
            raise DataError(
                "is remote, and there is no cache to read it through",
                place=path,
                remedy="pass a ShardCache to open_dataset: a directory on this host and its "
                "maximum size in bytes",
            )
        files = RemoteShards(path, cache)
        path = files.root
    else:
        files = LocalShards(Path(path), whole)

    # 2. The two small files that describe the dataset.
    description = _read_description(files)
    classes = _read_classes(files, description)

    # 3. Whether it is the wanted dataset. A run that continued with other images would not fail,
    #    it would only get worse; so the difference must stop it here.
    if fingerprint is not None and description.fingerprint != fingerprint:
        raise DataError(
            f"is a different dataset (fingerprint: {description.fingerprint}, "
            f"expected {fingerprint})",
            place=files.place,
            remedy="resume with the dataset that the run was started with, or start a new run",
        )
    return PreparedDataset(Path(path), files, description, classes)


def _raise_open_files_limit(files: int) -> None:
    """Raise this process's limit of open files by ``files``, as far as the system allows.

    Maps keep their files open, and the usual limit of 1024 is too low for a large dataset.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = soft + files
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _read_description(files: DatasetFiles) -> DatasetDescription:
    try:
        return DatasetDescription.parse(_read(files, DATASET_JSON))
    except UnsupportedFormat as error:
        raise DataError(str(error), place=files.place, remedy=PREPARE_ANOTHER_FORMAT) from None
    except ValueError as error:
        raise _damaged(files, DATASET_JSON, str(error)) from None


def _read_classes(files: DatasetFiles, description: DatasetDescription) -> list[ClassEntry]:
    """The classes in index order."""
    content = _read(files, CLASSES_JSON)
    try:
        entries = json.loads(content)
        classes = [ClassEntry(id=entry["id"], name=entry["name"]) for entry in entries]
    except (KeyError, TypeError):
        raise _damaged(files, CLASSES_JSON, "an entry lacks its id or name") from None
    except ValueError as error:
        raise _damaged(files, CLASSES_JSON, str(error)) from None
    if description.classes_digest not in ("", digest(content)):
        raise _damaged(files, CLASSES_JSON, "checksum mismatch")
    return classes


def _read(files: DatasetFiles, name: str) -> bytes:
    try:
        return files.read(name)
    except FileNotFoundError:
        raise DataError(
            f"no prepared dataset here ({name} is missing)",
            place=files.place,
            remedy=PREPARE_AGAIN,
        ) from None


def _damaged(files: DatasetFiles, name: str, cause: str) -> DataError:
    return DataError(f"is damaged: {cause}", place=f"{files.place}/{name}", remedy=PREPARE_AGAIN)
