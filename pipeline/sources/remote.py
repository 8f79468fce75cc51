"""Read from any file system that fsspec knows, with retries.

Transient errors are retried, permanent ones raised at once.

Throttling, dropped or refused connections, time-outs and short answers are transient. A missing
file and a refused access are permanent. A reader sees either the whole answer or a DataError, so a
fault of the network is never taken for damage of the data. Endpoints and keys come from the
environment or from fsspec's configuration, never from a job.

The retry schedule: attempt k (from 1) is followed by a pause of FIRST_DELAY * 2^(k - 1) seconds, at
most MAX_DELAY, times a factor between 0.5 and 1 that differs per path:

    attempt       1      2      3      4      5      6       7       8
    pause (s)    <0.5   <1     <2     <4     <8     <16     <30     none: raise Unreachable

All pauses together take 30 to 62 seconds, long enough for a store to start new servers.
"""

from __future__ import annotations

import errno
import io
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NotRequired, TypedDict, TypeVar, cast

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import DataError
from pipeline.sources.folder_files import with_target

MAX_ATTEMPTS = 8
FIRST_DELAY = 0.5  # seconds
MAX_DELAY = 30.0  # seconds
MAX_RETRY_TIME = 300.0  # seconds; slow attempts end after this time, however few there were
BLOCK = 8 << 20  # bytes per request when a file is read from end to end
HEADER_BLOCK = 1 << 16  # bytes per request when only the headers of a tar are read
INSTALL_S3 = 'run "./launch.sh install s3" in a checkout, else pip install "revcol-pipeline[s3]"'

_PERMANENT_ERRORS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
)
_TRANSIENT_ERRNOS = {
    None,  # an OSError of a library, without a number
    errno.EIO,
    errno.EBUSY,
    errno.EAGAIN,
    errno.EINTR,
    errno.EPIPE,
    errno.ETIMEDOUT,
    errno.ESTALE,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
    getattr(errno, "EREMOTEIO", errno.EIO),
}
# Errors of botocore and aiohttp, by name: these libraries are installed only where their kind of
# store is used.
_TRANSIENT_NAMES = {
    "HTTPClientError",
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ProxyConnectionError",
    "IncompleteReadError",
    "ResponseParserError",
    "ClientPayloadError",
    "ClientConnectionError",
}
_REFUSED_NAMES = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "NoAuthTokenError",
}
_SECRET_OPTION = re.compile(r"secret|token|password|key|credential|authorization", re.IGNORECASE)

Result = TypeVar("Result")


class Entry(TypedDict):
    """What fsspec tells of a file or folder (and of which a store may tell more)."""

    name: str
    type: str  # "file", "directory", ...; a link has that of its target, or "broken"
    size: int | None  # bytes
    islink: NotRequired[bool]


class Unreachable(DataError):
    """A store did not answer within the allowed attempts. The data itself is not at fault."""


class ShortRead(OSError):
    """An answer that is shorter than the requested range. Treated as transient."""


@dataclass(frozen=True)
class Storage:
    """A file system of fsspec whose every read is retried.

    Every method raises DataError when retries do not help.
    """

    fs: fsspec.AbstractFileSystem

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def shown(self, path: str) -> str:
        """A path as users know it (with its protocol), without secrets."""
        return path if self.is_local else without_secrets(str(self.fs.unstrip_protocol(path)))

    def info(self, path: str) -> Entry | None:
        """Name, type and size of a file or folder; None if it does not exist."""

        def fetch() -> Entry | None:
            try:
                return cast("Entry", dict(self.fs.info(path)))
            except FileNotFoundError as error:
                # fsspec's HTTP file system reports every failure as a missing file and keeps the
                # real one as the cause. "Missing" is believed only for status 404 (not found) and
                # 410 (gone).
                cause = error.__cause__
                if isinstance(cause, Exception) and (
                    is_transient(cause) or getattr(cause, "status", 404) not in (404, 410)
                ):
                    raise cause from None
                return None

        return self.with_retries(path, fetch)

    def is_folder(self, path: str) -> bool:
        info = self.info(path)
        return info is not None and info["type"] == "directory"

    def entries(self, folder: str) -> list[Entry]:
        """The files and folders directly in a folder."""
        entries: list[Entry] = self.with_retries(
            folder, lambda: list(self.fs.ls(folder, detail=True))
        )
        return list(map(with_target, entries)) if self.is_local else entries

    def files(self, folder: str) -> Iterator[tuple[str, int | None]]:
        """(path, bytes) of every file below a folder. Links to folders are not followed."""
        for entry in self.entries(folder):
            path = entry["name"].rstrip("/")
            if entry["type"] != "directory":
                yield path, entry["size"]
            elif path != folder:  # some stores list a folder inside itself
                yield from self.files(path)

    def read(self, path: str, first: int = 0, last: int | None = None) -> bytes:
        """All bytes [first, last) of a file; the whole file without ``last``."""
        if first == last:
            return b""

        def fetch() -> bytes:
            if last is None:
                return bytes(self.fs.cat_file(path))
            data = bytes(self.fs.cat_file(path, start=first, end=last))
            # A dropped connection may look like a short file. Without this check, its images would
            # count as truncated.
            if len(data) < last - first:
                raise ShortRead(f"{len(data)} of {last - first} bytes came")
            return data

        data = self.with_retries(path, fetch)
        if last is not None and len(data) > last - first:
            raise DataError(
                "its server cannot send a part of a file",
                place=self.shown(path),
                remedy="serve it from a store that supports HTTP ranges, or copy it here",
            )
        return data

    def open(self, path: str, first: int, last: int, block: int) -> io.BufferedReader:
        """Bytes [first, last) as a file of their own, fetched ``block`` bytes per request."""
        return io.BufferedReader(_Window(self, path, first, last), block)

    def with_retries(self, path: str, request: Callable[[], Result]) -> Result:
        """The result of ``request``, tried on the schedule at the top of this file."""
        start = time.monotonic()
        attempt = 1
        while True:
            try:
                return request()
            except Exception as error:
                # "from None": the library's own error may hold keys in its text, and would be
                # printed as the cause.
                if not is_transient(error):
                    raise self._explain(path, error) from None
                if attempt == MAX_ATTEMPTS or time.monotonic() - start > MAX_RETRY_TIME:
                    raise Unreachable(
                        f"could not be read in {attempt} attempts: {self._text(error)}",
                        place=self.shown(path),
                        remedy="check that the store is up and not throttling, "
                        "then rerun the same command",
                    ) from None
            time.sleep(retry_delay(path, attempt))
            attempt += 1

    def _explain(self, path: str, error: Exception) -> Exception:
        """A permanent error in the user's words; the error itself if it is a bug."""
        name = type(error).__name__
        has_refused_status = getattr(error, "status", None) in (401, 403)
        if isinstance(error, FileNotFoundError):
            cause = "does not exist"
            remedy = "correct the path, or put the file there"
        elif isinstance(error, PermissionError) or has_refused_status or name in _REFUSED_NAMES:
            cause = "access is refused"
            remedy = (
                "give this user, or the credentials in the environment, "
                "the right to list and read it"
            )
        elif isinstance(error, OSError) or type(error).__module__ != "builtins":
            cause = f"cannot be read: {self._text(error)}"
            remedy = "correct the path, or the settings of the store"
        else:
            return error
        return DataError(cause, place=self.shown(path), remedy=remedy)

    def _text(self, error: Exception) -> str:
        text = without_secrets(str(error).strip() or type(error).__name__)
        # Longest first: a secret may contain another one.
        for secret in sorted(_secrets(self.fs.storage_options), key=len, reverse=True):
            text = text.replace(secret, "***")
        return text


def open_storage(url: str) -> tuple[Storage, str]:
    """The file system of a URL or path, and the path in it.

    Raises DataError if fsspec knows no such file system.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:  # names the package that this kind of URL needs
        raise DataError(
            f"cannot be opened: {error}",
            place=without_secrets(url),
            remedy=INSTALL_S3
            if url.startswith(("s3:", "s3a:"))
            else "install the package that it names",
        ) from None
    except (ValueError, OSError) as error:
        raise DataError(
            f"cannot be opened: {error}",
            place=without_secrets(url),
            remedy="give a folder, or a URL that fsspec supports",
        ) from None
    if hasattr(fs, "retries"):
        fs.retries = 1  # s3fs retries too; its attempts times ours would take hours
    return Storage(fs), path.rstrip("/")


def is_transient(error: Exception) -> bool:
    """True if the same request may succeed a little later."""
    if isinstance(error, _PERMANENT_ERRORS):
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    status = getattr(error, "status", None)  # HTTP status of an error of aiohttp
    if isinstance(status, int) and status >= 400:
        # 408: request timeout; 425: too early; 429: too many requests; 5xx: fault of the server.
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    return any(kind.__name__ in _TRANSIENT_NAMES for kind in type(error).__mro__)


def retry_delay(path: str, attempt: int) -> float:
    """Seconds to wait after attempt number ``attempt`` (from 1): exponential backoff with jitter.

    The jitter is a hash of the path and the attempt, so that workers do not retry at the same
    moment and tests are exact.
    """
    jitter = xxhash.xxh3_64_intdigest(f"{path} {attempt}".encode()) / 2**64
    return min(FIRST_DELAY * 2.0 ** (attempt - 1), MAX_DELAY) * (0.5 + jitter / 2)


def without_secrets(text: str) -> str:
    """The text with user, password and query of its URLs replaced by ``***``."""
    without_users = re.sub(r"://[^/@\s\"']*@", "://***@", text)
    return re.sub(r"(://[^\s?\"'#]*)\?[^\s\"']*", r"\1?***", without_users)


def _secrets(options: Mapping[str, object]) -> set[str]:
    """Values of options whose names sound secret, at any depth."""
    secrets: set[str] = set()
    for name, value in options.items():
        if isinstance(value, Mapping):
            secrets |= _secrets(value)
        elif isinstance(value, str) and value and _SECRET_OPTION.search(str(name)):
            secrets.add(value)
    return secrets


class _Window(io.RawIOBase):
    """Bytes [first, last) of a stored file, as a seekable file of their own.

    Each read is one request.
    """

    def __init__(self, storage: Storage, path: str, first: int, last: int) -> None:
        self._storage = storage
        self._path = path
        self._first = first
        self._size = last - first
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._position))
        start = self._first + self._position
        buffer[:count] = self._storage.read(self._path, start, start + count)
        self._position += count
        return count
