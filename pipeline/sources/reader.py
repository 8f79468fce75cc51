"""Read the files of a part one after the other, from tars, folders or as its layout reads them.

Nothing is extracted to disk.

Archives come from strangers: names that lead out of the archive, links and devices are rejected,
never followed (D3, hostile archives). Damage of one archive rejects its own members and leaves the
other archives alone.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

from pipeline.errors import DataError
from pipeline.sources import registry
from pipeline.sources.flat_split import NO_LABEL
from pipeline.sources.folder_files import NOT_A_FILE, folder_files
from pipeline.sources.member import LEFT_OUT, MAX_BYTES, Member, Rejection
from pipeline.sources.names import is_litter
from pipeline.sources.remote import BLOCK, Storage, open_storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import Part


def members(part: Part, config: SourceConfig, classes: dict[str, int]) -> Iterator[Member]:
    """The files of a part, in their order. ``classes``: id -> index.

    Damage of an archive does not raise: the damaged stretch appears as one rejected member.

    Raises:
        DataError: the source cannot be read (a fault of the storage, not of the data).
    """
    if part.kind not in ("folder", "tar"):
        read = registry.layout(part.kind).read
        assert read is not None, part.kind
        yield from read(part, config, classes)
        return
    storage, _ = open_storage(config.root)
    if part.kind == "folder":
        yield from _read_folder(storage, part)
        return
    with storage.open(part.path, part.first, part.last, BLOCK) as file:
        yield from _read_tar(file, part)


def _read_folder(storage: Storage, part: Part) -> Iterator[Member]:
    files = folder_files(storage, part.path).files[part.first : part.last]
    if len(files) != part.last - part.first:
        raise DataError(
            f"has {len(files)} files where the survey saw {part.last - part.first}: it changed "
            "in between",
            place=storage.shown(part.path),
            remedy="rerun the same command when nothing writes into the source",
        )
    for number, (path, size) in enumerate(files):
        label = part.labels[number] if part.labels else part.label
        name = path.removeprefix(part.path).lstrip("/")
        key = f"{part.group}/{name}"
        if size == NOT_A_FILE:
            detail = f"no file, or a link that leads nowhere: {path}"
            yield Member(key=key, label=label, rejection=Rejection("not_a_file", detail))
        elif is_litter(name) or label == NO_LABEL:
            yield Member(
                key=key, label=label, rejection=Rejection(LEFT_OUT, "a system file or a note")
            )
        elif size is not None and size > MAX_BYTES:
            yield Member(key=key, label=label, rejection=_too_large(size))
        else:
            yield Member(key=key, label=label, data=storage.read(path, 0, size))


def _read_tar(file: io.BufferedIOBase, part: Part) -> Iterator[Member]:
    number = 0  # of regular files; ``part.labels`` counts only those
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                # tarfile remembers every member, which would grow with the archive.
                tar.members = []  # type: ignore[attr-defined]
                if info.isdir():
                    continue
                label = part.labels[number] if part.labels and info.isfile() else part.label
                number += info.isfile()
                # The labels of WebDataset lie in files of their own, one beside each image.
                if label != NO_LABEL or not part.labels:
                    yield _read_member(tar, info, f"{part.group}/{info.name}", label)
            _check_end(file, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        span = f"bytes {part.first} to {part.last}"
        yield Member(
            key=f"{part.group}/({span})",
            label=part.label,
            rejection=Rejection("damaged_archive", f"{part.path}, {span}: {error}"),
        )


def _check_end(file: io.BufferedIOBase, offset: int) -> None:
    """Raise TarError unless the tar really ends at ``offset``.

    tarfile takes a damaged header for the end of the archive and stops without an error. A real end
    is a block of zeros, or the end of the file (a part that was cut at a member's header has no
    block of zeros).
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    is_cut = 0 < len(block) < tarfile.BLOCKSIZE
    if any(block) or is_cut:
        raise tarfile.ReadError(f"damaged header at byte {offset}")


def _read_member(tar: tarfile.TarFile, info: tarfile.TarInfo, key: str, label: int) -> Member:
    rejection = _unsafe(info)
    if rejection is not None:
        return Member(key=key, label=label, rejection=rejection)
    opened = tar.extractfile(info)
    data = opened.read() if opened is not None else b""
    if len(data) < info.size:
        detail = f"the archive ends after {len(data)} of {info.size} bytes"
        rejection = Rejection("damaged_archive", detail)
    return Member(key=key, label=label, data=data, rejection=rejection)


def _unsafe(info: tarfile.TarInfo) -> Rejection | None:
    """Why a member must not be read, from its header alone; None if it may be."""
    if not info.isfile():
        return Rejection(LEFT_OUT, "a link or a device in the archive")
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return Rejection("unsafe_name", f"its name leads out of the archive: {info.name}")
    if info.size > MAX_BYTES:
        # The size is from the header: nothing of a huge member is read.
        return _too_large(info.size)
    return None


def _too_large(size: int) -> Rejection:
    return Rejection("too_large_file", f"{size} bytes, at most {MAX_BYTES}")
