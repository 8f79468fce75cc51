"""Reading from any file system that fsspec knows, patiently: what passes is tried again, what stays is said at once.

Throttling, cut or refused connections, time-outs and short answers are tried again, ATTEMPTS times in all and ever later;
a missing file or a refusal is not. Whoever reads sees whole answers or a DataError: a fault on the way is never taken for
damage of the data. Endpoints and keys come from the environment or fsspec's configuration, never from a job.
"""

from __future__ import annotations

import errno
import io
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import DataError

ATTEMPTS = 8
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds; in all about a minute
LONGEST = 300.0  # seconds, after which there is no further attempt, where each takes long
BLOCK = 8 << 20  # bytes a request, where a file is read through

_STAYS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
)
_PASSES = {
    None,
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
# By name, as these libraries are there only where their kind of store is used: botocore's and aiohttp's.
_PASSES_BY_NAME = {
    "HTTPClientError",
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ProxyConnectionError",
    "IncompleteReadError",
    "ResponseParserError",
    "ClientPayloadError",
    "ClientConnectionError",
}
_REFUSED_BY_NAME = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "NoAuthTokenError",
}
_SECRET = re.compile(r"secret|token|password|key|credential|authorization", re.IGNORECASE)

Result = TypeVar("Result")


class Unreachable(DataError):
    """A store has not answered within the bound: no fault of the data."""


class ShortRead(OSError):
    """An answer that is shorter than what was asked for; passes, as far as one can tell."""


@dataclass(frozen=True)
class Storage:
    """A file system of fsspec, of which everything is read with patience. Every method raises DataError in the end."""

    fs: Any

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def shown(self, path: str) -> str:
        """A path as people know it, without what is secret in it."""
        return path if self.is_local else without_secrets(str(self.fs.unstrip_protocol(path)))

    def info(self, path: str) -> dict[str, Any] | None:
        """What is known of a file or folder; None where there is none."""

        def look() -> dict[str, Any] | None:
            try:
                return dict(self.fs.info(path))
            except FileNotFoundError as error:
                cause = error.__cause__  # fsspec's HTTP takes any fault for a missing file
                if isinstance(cause, Exception) and (
                    passes(cause) or getattr(cause, "status", 404) not in (404, 410)
                ):
                    raise cause from None
                return None

        return self._patiently(path, look)

    def is_folder(self, path: str) -> bool:
        info = self.info(path)
        return info is not None and info["type"] == "directory"

    def entries(self, folder: str) -> list[dict[str, Any]]:
        """Name, type and size (bytes) of what lies directly in a folder."""
        return self._patiently(folder, lambda: list(self.fs.ls(folder, detail=True)))

    def files(self, folder: str) -> Iterator[tuple[str, int | None]]:
        """(path, bytes) of every file below a folder; links to folders are not followed."""
        for entry in self.entries(folder):
            name = entry["name"].rstrip("/")
            if (
                entry["type"] == "directory" and name != folder
            ):  # some stores list a folder in itself
                yield from self.files(name)
            elif entry["type"] != "directory":
                yield name, entry["size"]

    def read(self, path: str, first: int = 0, last: int | None = None) -> bytes:
        """Bytes [first, last) of a file, all of them; without ``last`` the whole file."""
        if first == last:
            return b""

        def fetch() -> bytes:
            data = (
                self.fs.cat_file(path)
                if last is None
                else self.fs.cat_file(path, start=first, end=last)
            )
            if last is not None and len(data) < last - first:
                raise ShortRead(f"{len(data)} of {last - first} bytes came")
            return bytes(data)

        data = self._patiently(path, fetch)
        if last is not None and len(data) > last - first:
            remedy = "serve it from a store that knows HTTP ranges, or copy it here"
            raise DataError(
                "its server cannot send a part of a file", place=self.shown(path), remedy=remedy
            )
        return data

    def open(self, path: str, first: int, last: int, block: int) -> io.BufferedReader:
        """Bytes [first, last) as a file of their own, fetched ``block`` bytes a request as they are read."""
        return io.BufferedReader(_Window(self, path, first, last), block)

    def _patiently(self, path: str, action: Callable[[], Result]) -> Result:
        attempt, began = 1, time.monotonic()
        while True:
            try:
                return action()
            except Exception as error:
                if not passes(error):
                    raise self._explained(path, error) from None  # its text may hold keys
                if attempt == ATTEMPTS or time.monotonic() - began > LONGEST:
                    remedy = "see whether the store is up and not throttling; then run the same command again"
                    cause = f"could not be read in {attempt} attempts: {self._text(error)}"
                    raise Unreachable(cause, place=self.shown(path), remedy=remedy) from None
            time.sleep(delay(path, attempt))
            attempt += 1

    def _explained(self, path: str, error: Exception) -> Exception:
        refused = isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)
        if isinstance(error, FileNotFoundError):
            cause, remedy = "is not there", "correct the path, or put the file there"
        elif refused or type(error).__name__ in _REFUSED_BY_NAME:
            cause = "access is refused"
            remedy = (
                "give this user, or the environment's credentials, the right to list and read it"
            )
        elif isinstance(error, OSError) or type(error).__module__ != "builtins":
            cause, remedy = (
                f"cannot be read: {self._text(error)}",
                "correct the path, or the settings of the store",
            )
        else:
            return error
        return DataError(cause, place=self.shown(path), remedy=remedy)

    def _text(self, error: Exception) -> str:
        text = without_secrets(str(error).strip() or type(error).__name__)
        for secret in sorted(_secrets(self.fs.storage_options), key=len, reverse=True):
            text = text.replace(secret, "***")
        return text


def open_storage(url: str) -> tuple[Storage, str]:
    """The file system of a URL or path, and the path in it. Raises DataError where fsspec knows no such kind."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError, OSError) as error:
        remedy = "a folder, or a URL that fsspec knows"
        raise DataError(
            f"cannot be opened: {error}", place=without_secrets(url), remedy=remedy
        ) from None
    if hasattr(fs, "retries"):
        fs.retries = 1  # s3fs and others: theirs times ours would be hours
    return Storage(fs), path.rstrip("/")


def passes(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, _STAYS):
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    status = getattr(error, "status", None)  # aiohttp's
    if isinstance(status, int) and status >= 400:
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, OSError) and error.errno in _PASSES:
        return True
    return any(kind.__name__ in _PASSES_BY_NAME for kind in type(error).__mro__)


def delay(path: str, attempt: int) -> float:
    """Seconds to wait after a failed attempt (from 1): doubled each time, and spread, so that workers do not come at once."""
    spread = xxhash.xxh3_64_intdigest(f"{path} {attempt}".encode()) / 2**64
    return min(FIRST_DELAY * 2.0 ** (attempt - 1), LONGEST_DELAY) * (0.5 + spread / 2)


def without_secrets(text: str) -> str:
    """URLs without user, password and query."""
    return re.sub(
        r"(://[^\s?\"'#]*)\?[^\s\"']*", r"\1?***", re.sub(r"://[^/@\s\"']*@", "://***@", text)
    )


def _secrets(options: Any) -> set[str]:
    found: set[str] = set()
    for name, value in options.items():
        if isinstance(value, Mapping):
            found |= _secrets(value)
        elif isinstance(value, str) and value and _SECRET.search(str(name)):
            found.add(value)
    return found


class _Window(io.RawIOBase):
    def __init__(self, storage: Storage, path: str, first: int, last: int) -> None:
        self._storage, self._path = storage, path
        self._first, self._size, self._position = first, last - first, 0

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

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._position))
        start = self._first + self._position
        buffer[:wanted] = self._storage.read(self._path, start, start + wanted)
        self._position += wanted
        return wanted
