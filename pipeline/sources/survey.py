"""What a source holds: its layout, classes and splits, cut into units of work. Looks at names and sizes, reads no image."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import fsspec

from pipeline.errors import DataError
from pipeline.sources import huggingface
from pipeline.sources.class_order import names_in, ordered_classes
from pipeline.sources.imagenet import HEADERS, OUTER_TRAIN, survey_imagenet
from pipeline.sources.inspection import TRAIN, VALIDATION
from pipeline.sources.remote import BLOCK, Storage, open_storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import (
    UNIT_BYTES,
    UNIT_FILES,
    Part,
    SplitName,
    Survey,
    Unit,
    bundle,
    listing,
)

AT_ONCE = 16  # tars or folders of a remote store that are looked at
Look = Callable[
    [Storage, str, str, int], list[Part]
]  # storage, folder, name and bytes of one of them


def survey(config: SourceConfig) -> Survey:
    """Look at a source. Raises DataError where it is missing, of no known layout, or has classes that its list lacks (D5)."""
    storage, root = open_root(config)
    layout = config.layout if config.layout != "auto" else _detect(storage, root, config)
    if layout == "huggingface":
        return _survey_huggingface(config)
    if layout == "imagenet_tars":
        return survey_imagenet(storage, root, config)
    return _survey_classes(storage, root, config, layout)


def open_root(config: SourceConfig) -> tuple[Storage, str]:
    """Where a dataset's root lies, and the path in it. Raises DataError."""
    storage, root = open_storage(config.root)
    if config.layout != "huggingface" and not storage.is_folder(root):
        remedy = "correct `root`, or mount the file system"
        raise DataError("there is no such folder", place=storage.shown(root), remedy=remedy)
    return storage, root


def _detect(storage: Storage, root: str, config: SourceConfig) -> str:
    names = names_in(storage, root)
    if OUTER_TRAIN in names:
        return "imagenet_tars"
    if {"dataset_dict.json", "dataset_info.json", "state.json"} & set(names) or any(
        name.endswith(".parquet") for name in names
    ):
        return "huggingface"
    folder = next((f"{root}/{name}" for name in TRAIN if name in names), root)
    inside = names_in(storage, folder)
    if any(name.endswith(".tar") for name in inside):
        return "class_tars"
    if any(entry["type"] == "directory" for entry in inside.values()):
        return "class_folders"
    remedy = "class tars or class folders (at the top, or below train/ and val/), or give `layout`"
    raise DataError("holds no images in a layout that is known", place=config.root, remedy=remedy)


def _survey_classes(storage: Storage, root: str, config: SourceConfig, layout: str) -> Survey:
    top = names_in(storage, root)
    splits: list[tuple[SplitName, str]] = []
    train = next((name for name in TRAIN if name in top and top[name]["type"] == "directory"), None)
    if train is None:
        splits = [("", root)]
    else:
        validation = next(
            (name for name in VALIDATION if name in top and top[name]["type"] == "directory"), None
        )
        splits = [("train" if validation else "", f"{root}/{train}")]
        splits += [("validation", f"{root}/{validation}")] if validation else []
    find = _tars if layout == "class_tars" else _folders
    found = {split: list(find(storage, folder)) for split, folder in splits}
    if not any(found.values()):
        what = "tars" if layout == "class_tars" else "folders of images"
        raise DataError(
            f"holds no {what}",
            place=config.root,
            remedy="one a class, named by the class; or give `layout`",
        )
    classes = ordered_classes(
        storage, root, config, sorted({part.group for parts in found.values() for part in parts})
    )
    labels = {one: index for index, (one, _) in enumerate(classes)}
    units: list[Unit] = []
    for split, parts in found.items():
        labelled = (replace(part, label=labels[part.group]) for part in parts)
        units += bundle(labelled, split, len(units))
    empty = sorted({part.group for parts in found.values() for part in parts if part.last == 0})
    notes = [f"{len(empty)} classes have no image: {', '.join(empty[:5])}"] if empty else []
    return Survey(layout, classes, units, listing(root, units), notes)


def _tars(storage: Storage, folder: str) -> Iterator[Part]:
    found = names_in(storage, folder).items()
    return _all_parts(
        _tar,
        storage,
        folder,
        [entry for name, entry in found if name.endswith(".tar") and entry["type"] == "file"],
    )


def _folders(storage: Storage, folder: str) -> Iterator[Part]:
    found = names_in(storage, folder).values()
    return _all_parts(
        _folder, storage, folder, [entry for entry in found if entry["type"] == "directory"]
    )


def _all_parts(
    look: Look, storage: Storage, folder: str, entries: list[dict[str, Any]]
) -> Iterator[Part]:
    """The parts of each tar or folder, in their order; a remote store is asked for several at once."""
    with ThreadPoolExecutor(1 if storage.is_local else AT_ONCE) as pool:
        names = [posixpath.basename(entry["name"].rstrip("/")) for entry in entries]
        sizes = [int(entry["size"] or 0) for entry in entries]
        for parts in pool.map(partial(look, storage, folder), names, sizes):
            yield from parts


def _tar(storage: Storage, folder: str, name: str, size: int) -> list[Part]:
    path, group = f"{folder}/{name}", name.removesuffix(".tar")
    return [
        Part("tar", path, first, last, group, size=last - first)
        for first, last in _ranges(storage, path, size)
    ]


def _folder(storage: Storage, folder: str, name: str, _: int) -> list[Part]:
    path = f"{folder}/{name}"
    sizes = [int(size or 0) for _, size in sorted(storage.files(path))]
    starts = range(0, max(len(sizes), 1), UNIT_FILES)
    pieces = [(first, sizes[first : first + UNIT_FILES]) for first in starts]
    return [
        Part("folder", path, first, first + len(piece), name, size=sum(piece))
        for first, piece in pieces
    ]


def _ranges(storage: Storage, path: str, size: int) -> list[tuple[int, int]]:
    """Byte ranges of about UNIT_BYTES that begin with a member's header. A tar that cannot be scanned stays whole."""
    if size <= 4 * UNIT_BYTES:
        return [(0, size)]
    starts = [0]
    block = HEADERS if storage.is_local else BLOCK  # images are smaller than what a request costs
    with storage.open(path, 0, size, block) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # else a list of all members grows
                    if member.offset - starts[-1] >= UNIT_BYTES:
                        starts.append(member.offset)
        except (tarfile.TarError, EOFError):
            pass  # its damage is told where it is read
    return list(zip(starts, [*starts[1:], size], strict=True))


def _survey_huggingface(config: SourceConfig) -> Survey:
    found = huggingface.look(config)
    nothing = Storage(fsspec.filesystem("memory"))
    classes = ordered_classes(nothing, "/none", config, found.names)
    units: list[Unit] = []
    for split, (name, rows) in found.splits.items():
        for first in range(0, rows, UNIT_FILES):
            part = Part("huggingface", name, first, min(first + UNIT_FILES, rows), split or "train")
            units.append(Unit(len(units), split, (part,)))
    return Survey("huggingface", classes, units, [(config.root, *found.fingerprints)], [])
