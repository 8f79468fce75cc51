"""Writes files that are never half-written, and computes digests of files.

Every write follows the same steps, so that a crash or a full disk at any moment leaves either the
old file or the new one, never a part of it:

1. write to a hidden temporary file in the same directory (``temporary_name``);
2. give it the mode of any new file (0666 less the umask), whichever library has written it;
3. fsync the temporary file, so that its content is on the disk before its name is;
4. rename it to the final name (atomic within a file system);
5. fsync the directory, so that the rename itself survives a power cut.

All digests are xxh3-128 in hexadecimal (32 characters). They detect damage, not manipulation.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import xxhash

BLOCK = 1 << 20  # bytes per read when a file is digested
_LONGEST_HOST = 32  # characters in a temporary name: a file name has at most 255 bytes
_DIGEST_LINE = "# xxh3-128 of the lines above: "
DIGEST = "digest"  # key under which a JSON object carries its own digest


def fsync_dir(path: Path) -> None:
    """Make renames inside the directory ``path`` durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that appears at ``path`` complete and durable, or not at all.

    Creates missing parent directories. If the body raises, the temporary file is deleted and an
    existing file at ``path`` stays unchanged.

        with atomic(path) as file:
            file.write(data)

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    with _renamed_on_success(path) as temporary, open(temporary, "wb") as file:
        yield file


def write_bytes(path: Path, data: bytes) -> None:
    """Write a binary file atomically. Raises OSError."""
    with atomic(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises OSError."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON atomically; keys keep their order.

    Raises:
        TypeError: ``value`` holds something that JSON has no form for.
        OSError: the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def write_with(path: Path, writer: Callable[[Path], None]) -> None:
    """Write a file atomically with a library that takes a file name instead of a file object.

    Args:
        writer: receives the temporary path and writes the complete file there.
    Raises:
        OSError: the file cannot be written; and any error that ``writer`` raises.
    """
    with _renamed_on_success(path) as temporary:
        writer(temporary)


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``path`` when the body ends without an error.

    The folder before it is deleted; if the body raises, the new one is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    temporary.mkdir()
    try:
        yield temporary
        # A folder cannot be renamed onto one that is not empty.
        old = path.with_name(temporary_name(path.name))
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        # From here on the new folder counts, even if the old one cannot be deleted.
        shutil.rmtree(old, ignore_errors=True)
        fsync_dir(path.parent)
    except BaseException:  # KeyboardInterrupt too: no temporary folder stays behind
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def _renamed_on_success(path: Path) -> Iterator[Path]:
    """Yield the path of an empty temporary file; then sync and rename the file there to ``path``.

    The body fills the file or puts another one in its place. If it raises, the file is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    try:
        # The mode of a new file is asked of the system and not computed: the umask can only be read
        # by changing it, for all threads, and a folder's default ACL takes its place.
        temporary.touch(exist_ok=False)
        mode = _mode(temporary)
        yield temporary  # step 1
        # Step 2. safetensors writes a private file (0600) and renames it to the path that it is
        # given: nobody else could read the weights.
        if _mode(temporary) != mode:
            temporary.chmod(mode)
        # Step 3. Without it, the rename may reach the disk before the content does, and a power
        # cut leaves an empty file under the final name.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)  # step 4
        fsync_dir(path.parent)  # step 5
    except BaseException:  # KeyboardInterrupt too: no temporary file stays behind
        temporary.unlink(missing_ok=True)
        raise


def temporary_name(name: str) -> str:
    """A hidden name beside ``name`` that no other process takes, whatever host it runs on.

    Example: ".weights.safetensors.gpu-17-4711-9f86d081.tmp". Processes in two containers may have
    the same ID and the same host name; hence the random part. Host and ID are for people.
    """
    host = os.uname().nodename.replace("/", "_")[:_LONGEST_HOST]
    return f".{name}.{host}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


def _mode(path: Path) -> int:
    """The permissions of a file, such as 0o644."""
    return stat.S_IMODE(path.stat().st_mode)


def digest(data: bytes | memoryview) -> str:
    """Digest of bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def file_digest(path: Path) -> str:
    """Digest of a file's content, read in blocks. Raises OSError."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            state.update(block)
    return state.hexdigest()


def json_digest(value: object) -> str:
    """Digest of a JSON-able value that does not depend on the order of its keys.

    Raises:
        TypeError: ``value`` holds something that JSON has no form for.
    """
    return digest(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def with_digest_line(text: str) -> str:
    """Text whose last line is a comment with the digest of the lines above."""
    return f"{text}{_DIGEST_LINE}{digest(text.encode())}\n"


def matches_digest_line(text: str) -> bool:
    """True for a text that is as `with_digest_line` gave it, or that has no such line."""
    body, mark, expected = text.rpartition(_DIGEST_LINE)
    return not mark or digest(body.encode()) == expected.strip()


def with_digest(record: Mapping[str, object]) -> dict[str, object]:
    """A JSON object with the digest of its other values under the key "digest"."""
    content = {key: value for key, value in record.items() if key != DIGEST}
    return {**content, DIGEST: json_digest(content)}


def matches_digest(record: Mapping[str, object]) -> bool:
    """True for a JSON object whose values are those of its digest, or that has none."""
    return DIGEST not in record or with_digest(record)[DIGEST] == record[DIGEST]
