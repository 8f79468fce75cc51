"""Remote shards on a node: fetched whole, checked, kept in a directory of bounded size that all its processes share.

A file is named by its digest, and is there complete and checked or not at all. What is being read, and what is being
fetched, is locked (flock: a lock ends with its holder); room is made by removing what was least recently read and is not
locked. Two processes that want the same shard fetch it once.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.data.shards import INDEX_ROWS
from pipeline.errors import DataError, StageError
from pipeline.files import fsync_dir
from pipeline.sources.remote import BLOCK, Storage, Unreachable, open_storage

FETCHES = 3  # of a file whose digest is wrong
DOWNLOADS = 4  # at once, in the background of a process
LOCKS = 64
POLL, PATIENCE = (
    0.05,
    200,
)  # seconds; times that there may be no room while nothing is being fetched
TOUCH = 1.0  # seconds for which a file counts as read just now


@dataclass(frozen=True)
class RemoteFile:
    """``bytes``: where they are known beforehand. ``digest``: xxh3-128 in hexadecimal."""

    storage: Storage
    path: str
    digest: str
    bytes: int | None = None


class ShardCache:
    """A directory of at most ``max_bytes`` for files of remote datasets; safe for any number of processes and threads."""

    def __init__(self, directory: Path, max_bytes: int = 256 << 30) -> None:
        self.directory, self.max_bytes = directory, max_bytes
        self._touched: dict[str, float] = {}
        with self._writing():
            directory.mkdir(parents=True, exist_ok=True)
            with self._locked("room"):
                self._make_room(0)  # clears away what killed processes left

    def open(self, file: RemoteFile) -> int:
        """A descriptor of the whole, checked file, which stays in the cache until it is closed.

        Raises:
            DataError: it is missing, or is not what its digest says however often it is fetched.
            StageError: the store does not answer, or there is no room: no fault of the data, nothing may stand in for it.
        """
        with self._writing():
            found = self._present(file)
            return found if found is not None else self._fetch(file)

    def fetch(self, file: RemoteFile) -> None:
        """See that the file is here, or is being fetched by somebody. Raises as `open`."""
        if not (self.directory / file.digest).exists():
            with contextlib.suppress(BlockingIOError), self._writing():
                os.close(self._fetch(file, wait=False))

    def _present(self, file: RemoteFile) -> int | None:
        try:
            found = os.open(self.directory / file.digest, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(found, fcntl.LOCK_SH)
        if file.bytes not in (None, os.fstat(found).st_size):  # the disk has lost a part
            os.close(found)
            return None
        now = time.monotonic()
        if now - self._touched.get(file.digest, -TOUCH) >= TOUCH:
            self._touched[file.digest] = now
            os.utime(found)
        return found

    def _fetch(self, file: RemoteFile, wait: bool = True) -> int:
        with self._locked(f"{int(file.digest[:2], 16) % LOCKS:02d}", wait):
            found = self._present(file)  # another process may have been faster
            if found is not None:
                return found
            for _ in range(FETCHES):
                found, digest = self._download(file)
                if digest == file.digest:
                    return found
            raise DataError(
                f"is not what was written: its digest is {digest}, dataset.json has {file.digest}",
                place=file.storage.shown(file.path),
                remedy="copy the dataset there again; `data verify` tells whether the original is whole",
            )

    def _download(self, file: RemoteFile) -> tuple[int, str]:
        """Descriptor and digest of what came; it is in its place only if the digest is right."""
        temporary, state = self.directory / f"{file.digest}.tmp", xxhash.xxh3_128()
        whole = file.storage.read(file.path) if file.bytes is None else b""
        descriptor = self._reserve(temporary, len(whole) or file.bytes or 0)
        try:
            with os.fdopen(os.dup(descriptor), "wb") as out:
                for block in [whole] if whole else _blocks(file):
                    out.write(block)
                    state.update(block)
            right = state.hexdigest() == file.digest
            if right:
                os.fsync(descriptor)
        except BaseException:
            self._drop(temporary, descriptor)
            raise
        if not right:
            self._drop(temporary, descriptor)
            return -1, state.hexdigest()
        with self._locked(
            "room"
        ):  # names change under this lock only: who counts bytes sees each file once
            os.replace(temporary, self.directory / file.digest)
        fsync_dir(self.directory)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor, file.digest

    def _drop(self, temporary: Path, descriptor: int) -> None:
        with self._locked("room"):
            temporary.unlink(missing_ok=True)
        os.close(descriptor)

    def _reserve(self, temporary: Path, size: int) -> int:
        """A new, locked file of this size, for which there is room."""
        idle = 0
        while size <= self.max_bytes and idle < PATIENCE:
            with self._locked("room"):
                free, fetching = self._make_room(size)
                if free >= size:
                    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    os.ftruncate(descriptor, size)
                    return descriptor
            idle += not fetching  # what others fetch can be removed when they have read it
            time.sleep(POLL)
        raise StageError(
            f"no room for a shard of {size} bytes: the cache may hold {self.max_bytes}, and the rest of it is in use",
            place=str(self.directory),
            remedy="let the cache be larger (max_bytes): several shards a process, and all indexes",
        )

    def _make_room(self, size: int) -> tuple[int, bool]:
        """Bytes that are free now, and whether somebody is fetching; the lock "room" is held."""
        entries = [entry for entry in os.scandir(self.directory) if not entry.name.startswith(".")]
        kept = {entry.name: entry.stat() for entry in entries}
        fetching = False
        for name in [name for name in kept if name.endswith(".tmp")]:
            if _remove_unused(self.directory / name):  # of a process that was killed
                del kept[name]
            else:
                fetching = True
        free = self.max_bytes - sum(stat.st_size for stat in kept.values())
        for name in sorted(kept, key=lambda name: kept[name].st_mtime_ns):
            if free >= size:
                break
            if not name.endswith(".tmp") and _remove_unused(self.directory / name):
                free += kept[name].st_size
        return free, fetching

    @contextlib.contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[None]:
        """Raises BlockingIOError if somebody else has the lock and ``wait`` is false."""
        descriptor = os.open(self.directory / f".lock-{name}", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Unreachable as error:
            raise StageError(error.cause, place=error.place, remedy=error.remedy) from None
        except BlockingIOError:
            raise
        except OSError as error:
            remedy = "a directory of this user's, on a disk with room for max_bytes"
            raise StageError(
                f"cannot be written: {error.strerror}", place=str(self.directory), remedy=remedy
            ) from error


def _blocks(file: RemoteFile) -> Iterator[bytes]:
    size = file.bytes or 0
    for first in range(0, size, BLOCK):
        yield file.storage.read(file.path, first, min(first + BLOCK, size))


def _remove_unused(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


@dataclass(frozen=True)
class CachedContent:
    """The bytes of a remote shard, to be sliced like a mapped one's; the shard comes when it is needed, and may go again."""

    cache: ShardCache
    file: RemoteFile

    def __getitem__(self, span: slice, /) -> memoryview:
        descriptor = self.cache.open(self.file)
        try:
            return memoryview(os.pread(descriptor, span.stop - span.start, span.start))
        finally:
            os.close(descriptor)


class CachedShards:
    """The files of a dataset behind a URL (see `pipeline.data.dataset.Files`)."""

    def __init__(self, url: str, cache: ShardCache) -> None:
        self._storage, self.root = open_storage(url)
        self.place = self._storage.shown(self.root)
        self._cache = cache
        self._announced: deque[RemoteFile] = deque()
        self._rest: deque[RemoteFile] = deque()
        self._waiting = threading.Condition()
        self._threads: list[threading.Thread] = []

    def read(self, name: str) -> bytes:
        if self._storage.info(f"{self.root}/{name}") is None:
            raise FileNotFoundError(name)
        return self._storage.read(f"{self.root}/{name}")

    def open(
        self, shards: Sequence[dict[str, Any]]
    ) -> tuple[list[CachedContent], list[NDArray[np.int64]]]:
        contents = [CachedContent(self._cache, self._file(shard)) for shard in shards]
        with ThreadPoolExecutor(2 * DOWNLOADS) as pool:
            indexes = list(pool.map(self._index, shards))
        if sum(shard["bytes"] for shard in shards) <= self._cache.max_bytes:
            self._begin(self._rest, shards)
        return contents, indexes

    def ahead(self, shards: Iterable[dict[str, Any]]) -> None:
        """Fetch these in the background, and no longer what was announced before; no more than fit."""
        with self._waiting:
            self._announced.clear()
        self._begin(self._announced, shards)

    def _begin(self, wanted: deque[RemoteFile], shards: Iterable[dict[str, Any]]) -> None:
        with self._waiting:
            wanted.extend(self._file(shard) for shard in shards)
            self._waiting.notify_all()
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._work, name=f"shards-{i}", daemon=True)
                for i in range(DOWNLOADS)
            ]
            for thread in self._threads:
                thread.start()

    def _work(self) -> None:
        while True:
            with self._waiting:
                self._waiting.wait_for(lambda: self._announced or self._rest)
                file = (self._announced or self._rest).popleft()
            with contextlib.suppress(DataError, StageError):  # raised again where the shard is read
                self._cache.fetch(file)

    def _file(self, shard: dict[str, Any]) -> RemoteFile:
        return RemoteFile(
            self._storage,
            f"{self.root}/{shard['file']}",
            self._checked(shard["digest"]),
            shard["bytes"],
        )

    def _index(self, shard: dict[str, Any]) -> NDArray[np.int64]:
        """The index, mapped; its file stays in the cache as long as the map."""
        path = f"{self.root}/{Path(shard['file']).with_suffix('.idx')}"
        descriptor = self._cache.open(
            RemoteFile(self._storage, path, self._checked(shard["index_digest"]))
        )
        try:
            content = mmap.mmap(
                descriptor, 0, access=mmap.ACCESS_READ
            )  # has a descriptor of its own, and so the lock
        finally:
            os.close(descriptor)
        values = INDEX_ROWS * int(shard["rows"])
        numbers = np.frombuffer(
            content, dtype="<i8", count=values, offset=len(content) - 8 * values
        )
        return numbers.reshape(INDEX_ROWS, shard["rows"])

    def _checked(self, digest: str) -> str:
        if not re.fullmatch(r"[0-9a-f]{32}", digest):
            raise DataError(
                f"is damaged: {digest!r} is no digest",
                place=f"{self.place}/dataset.json",
                remedy="copy it again",
            )
        return digest
