"""Files of a unit, one after the other: from tars, folders or datasets. Nothing is ever extracted to disk."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.sources import huggingface
from pipeline.sources.remote import BLOCK, Storage, open_storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import Part

MAX_BYTES = 256 << 20  # of one file, unpacked


@dataclass(frozen=True)
class Rejected:
    """A file that is no usable image; ``reason`` is one of a few words to count by, ``detail`` what exactly was found."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Member:
    """One file of a source: its key (unique in the dataset), class index, and its bytes or why there are none."""

    key: str
    label: int
    data: bytes = b""
    rejected: Rejected | None = None


def members(part: Part, config: SourceConfig, classes: dict[str, int]) -> Iterator[Member]:
    """The files of a part in their order; ``classes``: id -> index. Damage of an archive comes as rejected members."""
    if part.kind == "huggingface":
        for name, label, data in huggingface.rows(config, part.path, part.first, part.last):
            yield Member(f"{part.group}/{name}", classes[label], data)
        return
    storage, _ = open_storage(config.root)
    if part.kind == "folder":
        yield from _folder(storage, part)
        return
    with storage.open(part.path, part.first, part.last, BLOCK) as file:
        yield from _tar(file, part)


def _folder(storage: Storage, part: Part) -> Iterator[Member]:
    for path, size in sorted(storage.files(part.path))[part.first : part.last]:
        key = f"{part.group}/{path.removeprefix(part.path).lstrip('/')}"
        if size is not None and size > MAX_BYTES:
            yield Member(key, part.label, rejected=_too_large(size))
        else:
            yield Member(key, part.label, storage.read(path, 0, size))


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
            f"{part.group}/({place})",
            part.label,
            rejected=Rejected("damaged_archive", f"{part.path}, {place}: {error}"),
        )


def _check_end(file: io.BufferedIOBase, offset: int) -> None:
    """tarfile takes a damaged header for the end. Raises TarError unless there is a block of zeros, or nothing."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if any(block) or 0 < len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"damaged header at byte {offset}")


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, key: str, label: int) -> Member:
    if not info.isfile():
        return Member(
            key, label, rejected=Rejected("not_a_file", "a link or a device in the archive")
        )
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return Member(
            key,
            label,
            rejected=Rejected("unsafe_name", f"its name leads out of the archive: {info.name}"),
        )
    if info.size > MAX_BYTES:
        return Member(key, label, rejected=_too_large(info.size))
    opened = tar.extractfile(info)
    data = opened.read() if opened is not None else b""
    if len(data) < info.size:
        return Member(
            key,
            label,
            data,
            Rejected("damaged_archive", f"the archive ends after {len(data)} of {info.size} bytes"),
        )
    return Member(key, label, data)


def _too_large(size: int) -> Rejected:
    return Rejected("too_large_file", f"{size} bytes, at most {MAX_BYTES}")
