"""A dataset's files in a local directory: shards are memory-mapped, images are not copied."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from pipeline.data.shards import INDEX_ROWS, Index, ShardInfo, index_path
from pipeline.errors import DataError
from pipeline.files import file_digest

# The stage reads every file when it is named, and writes those that are missing or damaged.
PREPARE_AGAIN = "run the job with --stage prepare: it writes damaged files again"
PREPARE_ANOTHER_FORMAT = "prepare it again: run the job with --stage prepare --force"


class LocalShards:
    """The files of a dataset in the directory ``path`` (a `pipeline.data.dataset.DatasetFiles`).

    Args:
        whole: raise an error as soon as a split has a missing or truncated shard. If false, only
            reading an image of that shard raises it, so that a loader can replace those images.
    """

    def __init__(self, path: Path, whole: bool) -> None:
        self.path = path
        self.place = str(path)
        self.whole = whole

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def open(
        self, shards: Sequence[ShardInfo]
    ) -> tuple[list[MappedShard | UnreadableShard], list[Index]]:
        contents = [self._content(shard) for shard in shards]
        indexes = [_read_index(self.path, shard) for shard in shards]
        return contents, indexes

    def prefetch(self, shards: Iterable[ShardInfo]) -> None:
        """Nothing to do: the files are local."""

    def _content(self, shard: ShardInfo) -> MappedShard | UnreadableShard:
        try:
            return _map_shard(self.path, shard)
        except DataError as error:
            if self.whole:
                raise
            return UnreadableShard(error)


class MappedShard:
    """The bytes of a memory-mapped shard."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path = path
        self.content = content
        self.view = memoryview(content)

    def __getitem__(self, span: slice, /) -> memoryview:
        # If somebody truncates the file, touching a page beyond its new end kills the process
        # (SIGBUS), without an error that could name the shard. So ask for the size before every
        # slice: one fstat, which is negligible beside decoding an image.
        size = self.content.size()
        if size < span.stop:
            raise _truncated(self.path, size, len(self.view))
        return self.view[span]


class UnreadableShard:
    """Stands for a shard that is missing or truncated: reading any image of it raises the error."""

    def __init__(self, error: DataError) -> None:
        self.error = error

    def __getitem__(self, span: slice, /) -> memoryview:
        raise self.error


def _map_shard(directory: Path, shard: ShardInfo) -> MappedShard:
    path = directory / shard.file
    try:
        with open(path, "rb") as file:
            # The size is all that is checked here: reading terabytes to verify the digests would
            # delay every start. `Split.image` verifies each image when it is read.
            size = file.seek(0, 2)
            if size != shard.bytes:
                raise _truncated(path, size, shard.bytes)
            return MappedShard(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_index(directory: Path, shard: ShardInfo) -> Index:
    """The index of a shard, mapped. Raises DataError if it is missing or damaged."""
    path = index_path(directory / shard.file)
    index: Index = np.zeros((0, 0), np.int64)
    try:
        # Only a file with the expected digest is parsed.
        matches = file_digest(path) == shard.index_digest
        if matches:
            index = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not matches or index.shape != (INDEX_ROWS, shard.rows):
        raise DataError(
            "checksum mismatch: the index does not belong to this dataset",
            place=str(path),
            remedy=PREPARE_AGAIN,
        )
    return index


def _truncated(path: Path, size: int, expected: int) -> DataError:
    return DataError(
        f"has {size} bytes instead of {expected}", place=str(path), remedy=PREPARE_AGAIN
    )


def _unreadable(path: Path, error: OSError) -> DataError:
    remedy = PREPARE_AGAIN
    if error.errno == errno.EMFILE:
        remedy = "raise the limit of open files (ulimit -n): two per shard"
    return DataError(f"cannot be read: {error.strerror}", place=str(path), remedy=remedy)
