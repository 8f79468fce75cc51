"""A bounded cache on a host for the files of remote datasets, shared by all its processes.

The cache is one directory::

    3f0c...a1          a complete, verified file; its name is its digest (xxh3-128)
    77be...09.tmp      a file that somebody is downloading
    .lock-00 ... -63   fetch locks: files are distributed over them by digest
    .lock-capacity     the capacity lock

All locks are `flock` locks: the kernel releases them when their holder ends, so a killed process
never blocks others. Who holds which lock when:

1. A reader opens ``<digest>`` and takes a *shared* lock on that file. It holds the lock until it
   closes the descriptor. If the file exists, this is all.
2. Otherwise it takes the *fetch lock* of the digest and looks again: two processes that want the
   same shard download it once, because the second one waits here and then finds the file.
3. It takes the *capacity lock*, deletes files until ``size`` bytes are free (least recently read
   first, and only those that nobody has locked), creates ``<digest>.tmp`` with its final size and
   an *exclusive* lock, and releases the capacity lock. From now on the reserved bytes count, and
   nobody deletes the file.
4. It downloads into the temporary file, with the fetch lock but without the capacity lock: other
   files are downloaded at the same time.
5. If the digest is right, it renames the file to ``<digest>`` under the capacity lock. Whoever
   counts bytes holds that lock and lists the directory first, then asks for the sizes. A rename in
   between would let it see a file under both names, or look up a name that is gone.
6. It turns its exclusive lock into a shared one, releases the fetch lock and reads.

A fetch lock is always taken before the capacity lock, and nobody waits for any lock while it holds
the capacity lock (files are locked without blocking there). So there is no deadlock.

Worked example: max_bytes = 100. The cache holds A (40 bytes, last read 2 s ago) and B (40 bytes,
opened 5 s ago and still being read), and C (40 bytes) is wanted. 20 bytes are free. B is the least
recently read file, but locked; so A is deleted, 60 bytes are free, and C is reserved. If A were
locked too, the process would poll until one of them is released.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline.command import command
from pipeline.errors import DataError, StageError
from pipeline.files import fsync_dir
from pipeline.sources.remote import BLOCK, Storage, Unreachable

MAX_DOWNLOADS = 3  # of one file, if its digest is wrong each time
FETCH_LOCKS = 64
CAPACITY_LOCK = "capacity"
POLL_SECONDS = 0.05  # between two attempts to free space
MAX_IDLE_POLLS = 200  # attempts without space while nobody is downloading, then give up
TOUCH_SECONDS = 1.0  # a file's time of last use is updated at most this often


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file in a store. ``digest``: xxh3-128 in hexadecimal. ``bytes``: its size, if known."""

    storage: Storage
    path: str
    digest: str
    bytes: int | None = None


class ShardCache:
    """A directory of at most ``max_bytes`` bytes; safe for any number of processes and threads.

    Raises:
        StageError: the directory cannot be created or written.
    """

    def __init__(self, directory: Path, max_bytes: int = 256 << 30) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self._last_touch: dict[str, float] = {}  # digest -> time.monotonic()
        with self._storage_errors():
            directory.mkdir(parents=True, exist_ok=True)
            with self._locked(CAPACITY_LOCK):
                self._free_space(0)  # deletes the temporary files of killed processes

    def open(self, file: RemoteFile) -> int:
        """Return a descriptor of the complete, verified file; download the file if necessary.

        The file stays in the cache until the descriptor is closed.

        Raises:
            DataError: the file does not exist, or its digest is wrong after MAX_DOWNLOADS attempts.
            StageError: the store does not answer, or the cache is too small. The data is not at
                fault, so no other image may replace this one.
        """
        with self._storage_errors():
            descriptor = self._open_present(file)
            return descriptor if descriptor is not None else self._fetch(file)

    def fetch(self, file: RemoteFile) -> None:
        """Download the file unless it is present or somebody else is downloading it.

        Raises:
            DataError, StageError: as `open`.
        """
        with contextlib.suppress(BlockingIOError), self._storage_errors():
            try:
                # It is needed soon: it must not be the next one to be deleted.
                os.utime(self.directory / file.digest)
            except FileNotFoundError:
                os.close(self._fetch(file, wait=False))

    def _open_present(self, file: RemoteFile) -> int | None:
        """Step 1: a descriptor with a shared lock; None if the file is missing or incomplete."""
        path = self.directory / file.digest
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        # A crash of the host may have cost the end of the file: then download it again.
        if file.bytes not in (None, os.fstat(descriptor).st_size):
            os.close(descriptor)
            return None
        self._touch(file.digest, descriptor)
        return descriptor

    def _touch(self, digest: str, descriptor: int) -> None:
        """Set the modification time, by which the least recently read file is found."""
        # A loader opens a shard for every image. One update per second keeps the order nearly as
        # exact, and saves a write to the file system for each image.
        now = time.monotonic()
        if now - self._last_touch.get(digest, -TOUCH_SECONDS) >= TOUCH_SECONDS:
            self._last_touch[digest] = now
            os.utime(descriptor)

    def _fetch(self, file: RemoteFile, wait: bool = True) -> int:
        """Steps 2 to 6: a descriptor of the downloaded file, with a shared lock.

        Raises:
            BlockingIOError: ``wait`` is false and somebody else has the fetch lock.
        """
        number = int(file.digest[:2], 16) % FETCH_LOCKS
        with self._locked(f"{number:02d}", wait):
            descriptor = self._open_present(file)
            if descriptor is not None:  # another process downloaded it while this one waited
                return descriptor
            digest = ""
            for _ in range(MAX_DOWNLOADS):
                descriptor, digest = self._download(file)
                if descriptor is not None:
                    return descriptor
            raise DataError(
                f"checksum mismatch: its digest is {digest}, dataset.json has {file.digest}",
                place=file.storage.shown(file.path),
                remedy="copy the dataset there again; to check the original, run "
                + command("verify", "PATH"),
            )

    def _download(self, file: RemoteFile) -> tuple[int | None, str]:
        """Steps 3 to 6, once: the descriptor (None if the digest is wrong), and the digest."""
        temporary = self.directory / f"{file.digest}.tmp"
        # Space is reserved before the download. Without a known size (indexes, which are small),
        # read the file into memory first.
        content = file.storage.read(file.path) if file.bytes is None else None
        size = len(content) if content is not None else file.bytes or 0
        descriptor = self._reserve(temporary, size)
        try:
            digest = _copy([content] if content is not None else _blocks(file), descriptor)
            if digest == file.digest:
                os.fsync(descriptor)
        except BaseException:
            self._discard(temporary, descriptor)
            raise
        if digest != file.digest:
            self._discard(temporary, descriptor)
            return None, digest
        with self._locked(CAPACITY_LOCK):  # why the lock: see step 5
            os.replace(temporary, self.directory / file.digest)
        fsync_dir(self.directory)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor, digest

    def _discard(self, temporary: Path, descriptor: int) -> None:
        # Names change under the capacity lock only. Close the descriptor last: as long as the file
        # is locked, nobody else takes it for the leftover of a killed process.
        with self._locked(CAPACITY_LOCK):
            temporary.unlink(missing_ok=True)
        os.close(descriptor)

    def _reserve(self, temporary: Path, size: int) -> int:
        """Step 3: create the temporary file with its final size and an exclusive lock.

        Raises:
            StageError: there is no space, and nobody releases any.
        """
        idle_polls = 0
        while size <= self.max_bytes and idle_polls < MAX_IDLE_POLLS:
            with self._locked(CAPACITY_LOCK):
                free, downloading = self._free_space(size)
                if free >= size:
                    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    os.ftruncate(descriptor, size)
                    return descriptor
            # While others download, wait without a limit: once they have read their files, those
            # can be deleted. Without downloads, all files are being read, which takes moments.
            if not downloading:
                idle_polls += 1
            time.sleep(POLL_SECONDS)
        raise StageError(
            f"no room for a shard of {size} bytes: the cache may hold {self.max_bytes}, and the "
            "rest of it is in use",
            place=str(self.directory),
            remedy="raise the size of the cache (max_bytes): it must hold all indexes and several "
            "shards per process",
        )

    def _free_space(self, size: int) -> tuple[int, bool]:
        """Delete files until ``size`` bytes are free, if possible. Needs the capacity lock.

        Returns:
            The number of free bytes, and whether somebody is downloading.
        """
        entries = [entry for entry in os.scandir(self.directory) if not entry.name.startswith(".")]
        files = {entry.name: entry.stat() for entry in entries}
        downloading = False
        for name in [name for name in files if name.endswith(".tmp")]:
            if _delete_unlocked(self.directory / name):  # its process was killed
                del files[name]
            else:
                downloading = True
        free = self.max_bytes - sum(status.st_size for status in files.values())
        for name in sorted(files, key=lambda name: files[name].st_mtime_ns):
            if free >= size:
                break
            if not name.endswith(".tmp") and _delete_unlocked(self.directory / name):
                free += files[name].st_size
        return free, downloading

    @contextlib.contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[None]:
        """Hold the lock ``name``. Raises BlockingIOError if it is taken and ``wait`` is false."""
        path = self.directory / f".lock-{name}"
        # A new descriptor each time: flock locks belong to the open file, so that threads of one
        # process exclude each other as well.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Turn faults of the store or the directory into StageError: the data is not at fault."""
        try:
            yield
        except Unreachable as error:
            raise StageError(error.cause, place=error.place, remedy=error.remedy) from None
        except BlockingIOError:
            raise
        except OSError as error:
            raise StageError(
                f"cannot be written: {error.strerror}",
                place=str(self.directory),
                remedy="choose a directory that this user may write, on a disk with at least "
                "max_bytes free",
            ) from error


def _blocks(file: RemoteFile) -> Iterator[bytes]:
    """The content of a file of known size, one request per block."""
    size = file.bytes or 0
    for first in range(0, size, BLOCK):
        yield file.storage.read(file.path, first, min(first + BLOCK, size))


def _copy(blocks: Iterable[bytes], descriptor: int) -> str:
    """Write the blocks to the descriptor and return their digest (xxh3-128). Leaves it open."""
    state = xxhash.xxh3_128()
    with os.fdopen(os.dup(descriptor), "wb") as out:
        for block in blocks:
            out.write(block)
            state.update(block)
    return state.hexdigest()


def _delete_unlocked(path: Path) -> bool:
    """Delete the file if nobody has locked it; whether it is gone."""
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
