"""A dataset's files behind a URL: downloaded whole into a `ShardCache` and read from there."""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.description import DatasetDescription
from pipeline.data.shard_cache import RemoteFile, ShardCache
from pipeline.data.shards import INDEX_ROWS, Index, ShardInfo, index_path
from pipeline.errors import DataError, StageError
from pipeline.layout import DATASET_JSON
from pipeline.sources.remote import open_storage

DOWNLOAD_THREADS = 4  # that prefetch shards in the background
INDEX_THREADS = 8  # that download the indexes when a split is opened
NPY_HEADER_BYTES = 128  # of an array of few dimensions, padded by np.save
COPY_AGAIN = "copy the dataset there again"


@dataclass(frozen=True)
class CachedContent:
    """The bytes of a remote shard, read by slicing like those of a mapped one.

    Each slice opens the shard in the cache, which downloads it if necessary. Between two slices the
    cache may delete it.
    """

    cache: ShardCache
    file: RemoteFile

    def __getitem__(self, span: slice, /) -> memoryview:
        descriptor = self.cache.open(self.file)
        try:
            return memoryview(os.pread(descriptor, span.stop - span.start, span.start))
        finally:
            os.close(descriptor)


class RemoteShards:
    """The files of a dataset behind ``url`` (a `pipeline.data.dataset.DatasetFiles`).

    ``root``: path within the store. ``place``: URL for messages, without credentials.

    Two queues feed the download threads. ``_urgent`` holds the shards that `prefetch` announced
    last; ``_background`` holds the shards of whole splits that fit into the cache. The threads take
    from ``_background`` only while ``_urgent`` is empty.
    """

    def __init__(self, url: str, cache: ShardCache) -> None:
        self._storage, self.root = open_storage(url)
        self.place = self._storage.shown(self.root)
        self._cache = cache
        self._urgent: deque[RemoteFile] = deque()
        self._background: deque[RemoteFile] = deque()
        self._queued = threading.Condition()  # guards both queues
        self._threads: list[threading.Thread] = []

    def read(self, name: str) -> bytes:
        if self._storage.info(f"{self.root}/{name}") is None:
            raise FileNotFoundError(name)
        return self._storage.read(f"{self.root}/{name}")

    def open(self, shards: Sequence[ShardInfo]) -> tuple[list[CachedContent], list[Index]]:
        contents = [CachedContent(self._cache, self._shard_file(shard)) for shard in shards]
        # Threads download; the headers are parsed here, one after another. NumPy parses them with
        # the `ast` module, which fails at random when threads of CPython 3.11 use it at once.
        with ThreadPoolExecutor(INDEX_THREADS) as pool:
            maps = list(pool.map(self._map_index, shards))
        indexes = list(map(self._parse_index, shards, maps))
        # If all shards fit, download them once and for all. Otherwise only `prefetch` knows which
        # ones are needed soon; any others would push those out of the cache.
        if sum(shard.bytes for shard in shards) <= self._cache.max_bytes:
            self._enqueue(self._background, shards)
        return contents, indexes

    def prefetch(self, shards: Iterable[ShardInfo]) -> None:
        """Download these in the background, in this order; replaces earlier announcements."""
        with self._queued:
            self._urgent.clear()
        self._enqueue(self._urgent, shards)

    def _enqueue(self, waiting: deque[RemoteFile], shards: Iterable[ShardInfo]) -> None:
        with self._queued:
            waiting.extend(self._shard_file(shard) for shard in shards)
            self._queued.notify_all()
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._download_queued, name=f"shards-{i}", daemon=True)
                for i in range(DOWNLOAD_THREADS)
            ]
            for thread in self._threads:
                thread.start()

    def _download_queued(self) -> None:
        while True:
            with self._queued:
                self._queued.wait_for(lambda: self._urgent or self._background)
                file = (self._urgent or self._background).popleft()
            # An error here reaches nobody. It is raised again where an image of the shard is read.
            with contextlib.suppress(DataError, StageError):
                self._cache.fetch(file)

    def _shard_file(self, shard: ShardInfo) -> RemoteFile:
        return RemoteFile(
            storage=self._storage,
            path=f"{self.root}/{shard.file}",
            digest=self._valid_digest(shard.digest),
            bytes=shard.bytes,
        )

    def _map_index(self, shard: ShardInfo) -> mmap.mmap:
        """The index file of a shard. It stays in the cache as long as the map exists."""
        file = RemoteFile(
            storage=self._storage,
            path=self._index_path(shard),
            digest=self._valid_digest(shard.index_digest),
        )
        descriptor = self._cache.open(file)
        try:
            # mmap duplicates the descriptor. The duplicate shares the lock, so the cache keeps the
            # file until the map is released.
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)

    def _parse_index(self, shard: ShardInfo, content: mmap.mmap) -> Index:
        """The index in ``content``: a view of it, which keeps the map open."""
        index = _parse_npy(content)
        if index is None or index.shape != (INDEX_ROWS, shard.rows):
            raise DataError(
                f"is not the index of a shard of {shard.rows} rows",
                place=self._storage.shown(self._index_path(shard)),
                remedy=COPY_AGAIN,
            )
        return index

    def _index_path(self, shard: ShardInfo) -> str:
        return f"{self.root}/{index_path(Path(shard.file))}"

    def _valid_digest(self, digest: str) -> str:
        """``digest`` if it has the form of one: it becomes a file name in the cache."""
        if not re.fullmatch(r"[0-9a-f]{32}", digest):
            raise DataError(
                f"is damaged: {digest!r} is not a digest",
                place=f"{self.place}/{DATASET_JSON}",
                remedy=COPY_AGAIN,
            )
        return digest


def read_description(url: str) -> DatasetDescription:
    """The description of the dataset behind a URL. Needs no cache.

    Raises:
        DataError: there is no prepared dataset, it is damaged or of another format.
    """
    storage, root = open_storage(url)
    path = f"{root}/{DATASET_JSON}"
    if storage.info(path) is None:
        raise DataError(
            f"no prepared dataset here ({DATASET_JSON} is missing)",
            place=storage.shown(root),
            remedy="correct the URL",
        )
    try:
        return DatasetDescription.parse(storage.read(path))
    except ValueError as error:
        raise DataError(
            f"is damaged or of another format: {error}",
            place=storage.shown(path),
            remedy=COPY_AGAIN,
        ) from None


def _parse_npy(content: mmap.mmap) -> Index | None:
    """A view of an int64 array in NumPy format (version 1.0); None if the content is anything else.

    `numpy.load` maps files by name only; a file in the cache has a safe name only while it is open.
    """
    header = io.BytesIO(content[:NPY_HEADER_BYTES])
    try:
        np.lib.format.read_magic(header)
        shape, _, dtype = np.lib.format.read_array_header_1_0(header)
        values = np.frombuffer(
            content, dtype="<i8", count=math.prod(shape), offset=NPY_HEADER_BYTES
        )
    except ValueError:
        return None
    return values.reshape(shape) if dtype == np.dtype("<i8") else None
