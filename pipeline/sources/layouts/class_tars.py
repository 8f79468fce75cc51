"""<class>.tar files, at the top or in train/, val/ and test/."""

from __future__ import annotations

import posixpath
import tarfile

from pipeline.errors import DataError
from pipeline.sources.class_order import visible_entries
from pipeline.sources.class_survey import ClassParts, class_entries, survey_classes
from pipeline.sources.layout import Entries, Layout
from pipeline.sources.names import class_name, is_class_tar, is_image
from pipeline.sources.remote import BLOCK, HEADER_BLOCK, Entry, Storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.tar_names import require_one_class_each
from pipeline.sources.units import UNIT_BYTES, Part, Survey

_COMPARED = 8  # folders beside tars that are looked into


def _detect(storage: Storage, root: str, config: SourceConfig, entries: Entries) -> bool:
    inside = class_entries(storage, root, config, entries)
    tars = _tars(inside)
    folders = [name for name, entry in inside.items() if entry["type"] == "directory"]
    if not tars or not folders:
        return bool(tars)
    # Unpacked copies beside the tars are the same classes.
    if {class_name(tar) for tar in tars} & {class_name(folder) for folder in folders}:
        return True
    with_images = [
        name
        for name in folders[:_COMPARED]
        if any(map(is_image, visible_entries(storage, inside[name]["name"].rstrip("/"))))
    ]
    if with_images and len(tars) > 1:
        raise DataError(
            f"holds both tars ({tars[0]}, ...) and folders of images ({with_images[0]}, ...)",
            place=config.root,
            remedy="set `layout` of the dataset to class_tars or class_folders",
        )
    return not with_images


def _survey(storage: Storage, root: str, config: SourceConfig) -> Survey:
    inside = class_entries(storage, root, config, visible_entries(storage, root))
    tars = [inside[name] for name in _tars(inside)]
    require_one_class_each(storage, [(tar["name"], int(tar["size"] or 0)) for tar in tars])
    return survey_classes(storage, root, config, layout="class_tars", find_parts=_cut_tar)


def _tars(entries: Entries) -> list[str]:
    return [name for name, entry in entries.items() if is_class_tar(name) and _is_file(entry)]


def _is_file(entry: Entry) -> bool:
    return entry["type"] == "file"


def _cut_tar(storage: Storage, path: str, entry: Entry) -> ClassParts:
    parts = [
        Part(
            kind="tar",
            path=path,
            first=first,
            last=last,
            group=class_name(posixpath.basename(path)),
            size=last - first,
        )
        for first, last in _byte_ranges(storage, path, int(entry["size"] or 0))
    ]
    return ClassParts(parts=parts)


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


LAYOUT = Layout(order=4, detect=_detect, survey=_survey)
