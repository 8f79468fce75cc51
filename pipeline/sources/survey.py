"""Survey a source: its layout, classes and splits, cut into units of work.

Reads names and sizes, no image.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import fsspec

from pipeline.errors import DataError
from pipeline.sources import huggingface, names
from pipeline.sources.class_order import ordered_classes, visible_entries
from pipeline.sources.imagenet import HEADER_BLOCK, OUTER_TRAIN, survey_imagenet
from pipeline.sources.remote import BLOCK, Entry, Storage, open_storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import (
    UNIT_BYTES,
    UNIT_FILES,
    Part,
    SplitName,
    Survey,
    Unit,
    fingerprint_items,
    pack_units,
)

CONCURRENT_REQUESTS = 16  # tars or folders of a remote store that are listed at the same time
HUGGINGFACE_FILES = {*huggingface.SAVED_FILES, "dataset_info.json"}

# Cuts one tar or folder into parts: (storage, parent folder, name, bytes) -> parts.
PartFinder = Callable[[Storage, str, str, int], list[Part]]


def survey(config: SourceConfig) -> Survey:
    """Survey a source.

    Raises:
        DataError: the source is missing, has no known layout, or has classes that its class list
            lacks (D5).
    """
    storage, root = open_root(config)
    layout = config.layout if config.layout != "auto" else _detect_layout(storage, root, config)
    if layout == "huggingface":
        return _survey_huggingface(config)
    if layout == "imagenet_tars":
        return survey_imagenet(storage, root, config)
    return _survey_classes(storage, root, config, layout)


def open_root(config: SourceConfig) -> tuple[Storage, str]:
    """The storage of a dataset's root, and the path in it. Raises DataError."""
    storage, root = open_storage(config.root)
    if config.layout != "huggingface" and not storage.is_folder(root):
        remedy = "correct `root`, or mount the file system"
        raise DataError("there is no such folder", place=storage.shown(root), remedy=remedy)
    return storage, root


def _detect_layout(storage: Storage, root: str, config: SourceConfig) -> str:
    # From the most specific layout to the least: ImageNet's archives are tars as well.
    entries = visible_entries(storage, root)
    if OUTER_TRAIN in entries:
        return "imagenet_tars"
    if HUGGINGFACE_FILES & set(entries) or any(name.endswith(".parquet") for name in entries):
        return "huggingface"
    train = names.first_present(names.TRAIN_NAMES, entries)
    inside = entries if train is None else visible_entries(storage, f"{root}/{train}")
    if any(names.is_class_tar(name) for name in inside):
        return "class_tars"
    if any(entry["type"] == "directory" for entry in inside.values()):
        return "class_folders"
    remedy = (
        "provide class tars or class folders (at the top, or below train/ and val/), "
        "or set `layout`"
    )
    raise DataError("holds no images in a layout that is known", place=config.root, remedy=remedy)


def _survey_classes(storage: Storage, root: str, config: SourceConfig, layout: str) -> Survey:
    find_parts = _tar_parts if layout == "class_tars" else _folder_parts
    parts_of: dict[SplitName, list[Part]] = {
        split: list(find_parts(storage, folder))
        for split, folder in _split_folders(storage, root).items()
    }
    all_parts = [part for parts in parts_of.values() for part in parts]
    if not all_parts:
        missing = "tars" if layout == "class_tars" else "folders of images"
        remedy = "provide one per class, named by the class; or set `layout`"
        raise DataError(f"holds no {missing}", place=config.root, remedy=remedy)
    classes = ordered_classes(storage, root, config, sorted({part.group for part in all_parts}))
    label_of = {class_id: label for label, (class_id, _) in enumerate(classes)}
    units: list[Unit] = []
    for split, parts in parts_of.items():
        # Labels depend on the classes of all splits, so they are filled in only now.
        labelled = (replace(part, label=label_of[part.group]) for part in parts)
        units += pack_units(labelled, split, len(units))
    return Survey(
        layout=layout,
        classes=classes,
        units=units,
        fingerprint_items=fingerprint_items(root, units),
        notes=_notes(all_parts),
    )


def _split_folders(storage: Storage, root: str) -> dict[SplitName, str]:
    """The folders to read, by split.

    Three cases: train/ and val/ (two splits); train/ alone, or classes at the top ("": the split is
    decided per image).
    """
    entries = visible_entries(storage, root)
    subfolders = [name for name, entry in entries.items() if entry["type"] == "directory"]
    train = names.first_present(names.TRAIN_NAMES, subfolders)
    validation = names.first_present(names.VALIDATION_NAMES, subfolders)
    # A validation folder counts only beside a training folder: "test" alone may be a class.
    if train is None:
        return {"": root}
    if validation is None:
        return {"": f"{root}/{train}"}
    return {"train": f"{root}/{train}", "validation": f"{root}/{validation}"}


def _notes(parts: Iterable[Part]) -> list[str]:
    empty = sorted({part.group for part in parts if part.last == 0})
    return [f"{len(empty)} classes have no image: {', '.join(empty[:5])}"] if empty else []


def _tar_parts(storage: Storage, folder: str) -> Iterator[Part]:
    tars = [
        entry
        for name, entry in visible_entries(storage, folder).items()
        if names.is_class_tar(name) and entry["type"] == "file"
    ]
    return _parts_of_all(_cut_tar, storage, folder, tars)


def _folder_parts(storage: Storage, folder: str) -> Iterator[Part]:
    entries = visible_entries(storage, folder).values()
    folders = [entry for entry in entries if entry["type"] == "directory"]
    return _parts_of_all(_cut_folder, storage, folder, folders)


def _parts_of_all(
    find: PartFinder, storage: Storage, folder: str, entries: list[Entry]
) -> Iterator[Part]:
    """The parts of each tar or folder, in order.

    Requests to a remote store overlap; their results keep the order.
    """
    entry_names = [posixpath.basename(entry["name"].rstrip("/")) for entry in entries]
    sizes = [int(entry["size"] or 0) for entry in entries]
    with ThreadPoolExecutor(1 if storage.is_local else CONCURRENT_REQUESTS) as pool:
        for parts in pool.map(partial(find, storage, folder), entry_names, sizes):
            yield from parts


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


def _cut_folder(storage: Storage, folder: str, name: str, _: int) -> list[Part]:
    path = f"{folder}/{name}"
    sizes = [int(size or 0) for _, size in sorted(storage.files(path))]
    parts: list[Part] = []
    # An empty folder is one part without files, so that its class is known.
    for first in range(0, max(len(sizes), 1), UNIT_FILES):
        part_sizes = sizes[first : first + UNIT_FILES]
        parts.append(
            Part(
                kind="folder",
                path=path,
                first=first,
                last=first + len(part_sizes),
                group=name,
                size=sum(part_sizes),
            )
        )
    return parts


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


def _survey_huggingface(config: SourceConfig) -> Survey:
    dataset = huggingface.inspect_dataset(config)
    # A dataset has no synsets.txt; an empty file system stands for that.
    no_files = Storage(fsspec.filesystem("memory"))
    classes = ordered_classes(no_files, "/none", config, dataset.class_ids)
    units: list[Unit] = []
    for split, (name, rows) in dataset.splits.items():
        for first in range(0, rows, UNIT_FILES):
            part = Part(
                kind="huggingface",
                path=name,
                first=first,
                last=min(first + UNIT_FILES, rows),
                group=split or "train",
            )
            units.append(Unit(len(units), split, (part,)))
    return Survey(
        layout="huggingface",
        classes=classes,
        units=units,
        fingerprint_items=[(config.root, *dataset.fingerprints)],
        notes=[],
    )
