"""One folder per class, at the top or in train/, val/ and test/."""

from __future__ import annotations

import posixpath

from pipeline.sources.class_survey import ClassParts, class_entries, survey_classes
from pipeline.sources.folder_files import folder_files
from pipeline.sources.layout import Entries, Layout
from pipeline.sources.names import class_name, is_litter, may_be_image
from pipeline.sources.remote import Entry, Storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import UNIT_FILES, Part, Survey


def _detect(storage: Storage, root: str, config: SourceConfig, entries: Entries) -> bool:
    inside = class_entries(storage, root, config, entries).values()
    return any(entry["type"] == "directory" for entry in inside)


def _survey(storage: Storage, root: str, config: SourceConfig) -> Survey:
    return survey_classes(storage, root, config, layout="class_folders", find_parts=_cut_folder)


def _cut_folder(storage: Storage, path: str, _: Entry) -> ClassParts:
    listing = folder_files(storage, path, check_access=True)
    notes = [f"{link} is not followed: it leads to a folder around it" for link in listing.loops]
    names = [file.removeprefix(path).lstrip("/") for file, _ in listing.files]
    sizes = [max(size or 0, 0) for _, size in listing.files]
    may_be = [may_be_image(name) for name in names]
    others = [name for name in names if not is_litter(name)]
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


LAYOUT = Layout(order=5, detect=_detect, survey=_survey)
