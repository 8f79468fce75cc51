"""One folder per class, at the top or in train/, val/ and test/."""

from __future__ import annotations

import posixpath
import re

from pipeline.errors import DataError
from pipeline.sources.class_survey import ClassParts, class_entries, survey_classes
from pipeline.sources.folder_files import NOT_A_FILE, folder_files
from pipeline.sources.image_kinds import HEAD_BYTES, image_kind
from pipeline.sources.layout import Entries, Layout
from pipeline.sources.names import class_name, is_image, is_litter, may_be_image, suffix_of
from pipeline.sources.remote import Entry, Storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import UNIT_FILES, Part, Survey

_NUMBER = re.compile(r"\d{4,}")  # of the parts that a downloader fills one after the other
_LOOKED_AT = 3  # files of a folder without a usual ending
_CAPTION_SUFFIXES = (".txt", ".json", ".caption")


def _detect(storage: Storage, root: str, config: SourceConfig, entries: Entries) -> bool:
    inside = class_entries(storage, root, config, entries).values()
    return any(entry["type"] == "directory" for entry in inside)


def _survey(storage: Storage, root: str, config: SourceConfig) -> Survey:
    survey = survey_classes(storage, root, config, layout="class_folders", find_parts=_cut_folder)
    if config.splits is None and all(_NUMBER.fullmatch(name) for name, _ in survey.classes):
        _require_no_captions(storage, survey.units[0].parts[0], config)
    return survey


def _require_no_captions(storage: Storage, part: Part, config: SourceConfig) -> None:
    """Raise DataError for numbered folders in which every image has a caption."""
    listing = folder_files(storage, part.path).files
    names = [path for path, _ in listing if suffix_of(path) in _CAPTION_SUFFIXES]
    if part.images and len(names) >= part.images:
        raise DataError(
            f"its folders are numbered, and every image has a caption ({names[0]}): no classes",
            place=config.root,
            remedy="sort the images by class; or --set data.splits=none if the numbers are classes",
        )


def _cut_folder(storage: Storage, path: str, _: Entry) -> ClassParts:
    listing = folder_files(storage, path, check_access=True)
    notes = [f"{link} is not followed: it leads to a folder around it" for link in listing.loops]
    names = [file.removeprefix(path).lstrip("/") for file, _ in listing.files]
    sizes = [max(size or 0, 0) for _, size in listing.files]
    may_be = [may_be_image(name) for name in names]
    others = [name for name in names if not is_litter(name)]
    if others and not any(map(is_image, others)):
        # Only the content of odd names tells. One look for a folder: its files are of one kind.
        has_image = _holds_image(storage, listing.files, names)
        may_be = [has_image and not is_litter(name) for name in names]
    if others and not any(may_be):
        # Annotations, for example. An empty folder is a class whose images are still to come.
        note = f"{path} is no class: it holds no image but files such as {others[0]}"
        return ClassParts(parts=[], notes=[*notes, note], refused=listing.refused)
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
                group=class_name(posixpath.basename(path)),
                size=sum(part_sizes),
                images=sum(may_be[first : first + UNIT_FILES]),
            )
        )
    return ClassParts(parts=parts, notes=notes, refused=listing.refused)


def _holds_image(storage: Storage, files: list[tuple[str, int | None]], names: list[str]) -> bool:
    """True if one of the first files that are no litter begins like an image."""
    candidates = [
        (path, size)
        for (path, size), name in zip(files, names, strict=True)
        if not is_litter(name) and size != NOT_A_FILE
    ]
    heads = [
        storage.read(path, 0, min(HEAD_BYTES, size or HEAD_BYTES))
        for path, size in candidates[:_LOOKED_AT]
    ]
    return any(map(image_kind, heads))


LAYOUT = Layout(order=5, detect=_detect, survey=_survey)
