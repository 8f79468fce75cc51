"""<class>.tar files, at the top or in train/, val/ and test/."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

from pipeline.sources import names
from pipeline.sources.class_order import visible_entries
from pipeline.sources.class_survey import class_entries, parts_of_all, survey_classes
from pipeline.sources.layout import Entries, Layout
from pipeline.sources.remote import BLOCK, HEADER_BLOCK, Storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import UNIT_BYTES, Part, Survey


def _detect(storage: Storage, root: str, config: SourceConfig, entries: Entries) -> bool:
    return any(names.is_class_tar(name) for name in class_entries(storage, root, config, entries))


def _survey(storage: Storage, root: str, config: SourceConfig) -> Survey:
    return survey_classes(storage, root, config, layout="class_tars", find_parts=_tar_parts)


def _tar_parts(storage: Storage, folder: str) -> Iterator[Part]:
    tars = [
        entry
        for name, entry in visible_entries(storage, folder).items()
        if names.is_class_tar(name) and entry["type"] == "file"
    ]
    return parts_of_all(_cut_tar, storage, folder, tars)


def _cut_tar(storage: Storage, folder: str, name: str, size: int) -> list[Part]:
    path = f"{folder}/{name}"
    return [
        Part(
            kind="tar",
            path=path,
            first=first,
            last=last,
            group=names.class_of_tar(name),
            size=last - first,
        )
        for first, last in _byte_ranges(storage, path, size)
    ]


def _byte_ranges(storage: Storage, path: str, size: int) -> list[tuple[int, int]]:
    """Byte ranges of about UNIT_BYTES, each beginning with a member's header.

    A small tar stays whole: the scan reads every header, which costs more than it gains. So does a
    damaged one.
    """
    if size <= 4 * UNIT_BYTES:
        return [(0, size)]
    starts = [0]
    # On a local disk, skip from header to header. A remote request costs more than reading the
    # images in between.
    block = HEADER_BLOCK if storage.is_local else BLOCK
    with storage.open(path, 0, size, block) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    # tarfile remembers every member, which would grow with the archive.
                    tar.members = []  # type: ignore[attr-defined]
                    if member.offset - starts[-1] >= UNIT_BYTES:
                        starts.append(member.offset)
        except (tarfile.TarError, EOFError):
            pass  # the reader reports the damage
    return list(zip(starts, [*starts[1:], size], strict=True))


LAYOUT = Layout(order=3, detect=_detect, survey=_survey)
