"""Copies files to and from any file system that fsspec knows, with the retries of ``remote``."""

from __future__ import annotations

import contextlib
from pathlib import Path

import xxhash

from pipeline.sources.remote import BLOCK, Storage


class WritableStorage(Storage):
    """A file system of fsspec that is written to.

    Every method raises DataError when retries do not help.
    """

    def write(self, path: str, data: bytes) -> None:
        """Write a file, with its folders."""

        def put() -> None:
            self._make_folder(path)
            self.fs.pipe_file(path, data)

        self.with_retries(path, put)

    def upload(self, local: Path, path: str) -> None:
        """Copy a file of this machine, of any size. Raises FileNotFoundError if it is gone."""

        def put() -> None:
            if not local.exists():
                return  # checked below: a missing source is not the store's error
            self._make_folder(path)
            self.fs.put_file(str(local), path)

        self.with_retries(path, put)
        local.stat()

    def download(self, path: str, local: Path) -> None:
        """Copy a file to this machine, of any size."""
        self.with_retries(path, lambda: self.fs.get_file(path, str(local)))

    def digest(self, path: str) -> str:
        """xxh3-128 of a file's content, in hexadecimal."""
        size = (self.info(path) or {"size": 0})["size"] or 0
        state = xxhash.xxh3_128()
        for first in range(0, size, BLOCK):
            state.update(self.read(path, first, min(first + BLOCK, size)))
        return state.hexdigest()

    def delete(self, path: str) -> None:
        """Delete a file or a folder; nothing happens if it is not there."""

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(path, recursive=True)

        self.with_retries(path, remove)

    def _make_folder(self, path: str) -> None:
        # An object store has no folders, and s3fs would take the first part for a new bucket.
        if self.is_local:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
