"""Files of a unit, one after the other: from tars, folders or datasets. Nothing is ever extracted to disk."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import DatasetConfig
from pipeline.prepare import huggingface
from pipeline.prepare.clean import MAX_BYTES, Rejected
from pipeline.prepare.sources import open_root
from pipeline.prepare.units import Part


@dataclass(frozen=True)
class Member:
    """One file of a source: its key (unique in the dataset), class index, and its bytes or why there are none."""

    key: str
    label: int
    data: bytes = b""
    rejected: Rejected | None = None


class Window(io.RawIOBase):
    """Bytes [first, last) of a file as a file of its own."""

    def __init__(self, file: Any, first: int, last: int) -> None:
        self._file, self._first, self._size, self._position = file, first, last - first, 0

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
        self._file.seek(self._first + self._position)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def members(part: Part, config: DatasetConfig, classes: dict[str, int]) -> Iterator[Member]:
    """The files of a part in their order; ``classes``: id -> index. Damage of an archive comes as rejected members."""
    if part.kind == "huggingface":
        for name, label, data in huggingface.rows(config, part.path, part.first, part.last):
            yield Member(f"{part.group}/{name}", classes[label], data)
        return
    fs, _ = open_root(config)
    if part.kind == "folder":
        yield from _folder(fs, part)
        return
    with fs.open(part.path, "rb") as file:
        window = io.BufferedReader(Window(file, part.first, part.last), 1 << 20)
        yield from _tar(window, part)


def _folder(fs: Any, part: Part) -> Iterator[Member]:
    for path in sorted(fs.find(part.path))[part.first : part.last]:
        key = f"{part.group}/{path.removeprefix(part.path).lstrip('/')}"
        if fs.size(path) > MAX_BYTES:
            yield Member(key, part.label, rejected=_too_large(fs.size(path)))
        else:
            yield Member(key, part.label, fs.cat_file(path))


def _tar(file: io.BufferedIOBase, part: Part) -> Iterator[Member]:
    number = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # else a list of all members grows
                if info.isdir():
                    continue
                label = part.labels[number] if part.labels and info.isfile() else part.label
                number += info.isfile()
                yield _member(tar, info, f"{part.group}/{info.name}", label)
            _check_end(file, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        place = f"bytes {part.first} to {part.last}"
        yield Member(
            f"{part.group}/({place})", part.label, rejected=Rejected("damaged_archive", f"{part.path}, {place}: {error}")
        )


def _check_end(file: io.BufferedIOBase, offset: int) -> None:
    """tarfile takes a damaged header for the end. Raises TarError unless there is a block of zeros, or nothing."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if any(block) or 0 < len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"damaged header at byte {offset}")


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, key: str, label: int) -> Member:
    if not info.isfile():
        return Member(key, label, rejected=Rejected("not_a_file", "a link or a device in the archive"))
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return Member(key, label, rejected=Rejected("unsafe_name", f"its name leads out of the archive: {info.name}"))
    if info.size > MAX_BYTES:
        return Member(key, label, rejected=_too_large(info.size))
    opened = tar.extractfile(info)
    data = opened.read() if opened is not None else b""
    if len(data) < info.size:
        return Member(key, label, data, Rejected("damaged_archive", f"the archive ends after {len(data)} of {info.size} bytes"))
    return Member(key, label, data)


def _too_large(size: int) -> Rejected:
    return Rejected("too_large_file", f"{size} bytes, at most {MAX_BYTES}")
