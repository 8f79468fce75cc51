"""One folder per class, at the top or in train/, val/ and test/."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.sources.class_order import visible_entries
from pipeline.sources.class_survey import class_entries, parts_of_all, survey_classes
from pipeline.sources.layout import Entries, Layout
from pipeline.sources.remote import Storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import UNIT_FILES, Part, Survey


def _detect(storage: Storage, root: str, config: SourceConfig, entries: Entries) -> bool:
    inside = class_entries(storage, root, config, entries).values()
    return any(entry["type"] == "directory" for entry in inside)


def _survey(storage: Storage, root: str, config: SourceConfig) -> Survey:
    return survey_classes(storage, root, config, layout="class_folders", find_parts=_folder_parts)


def _folder_parts(storage: Storage, folder: str) -> Iterator[Part]:
    entries = visible_entries(storage, folder).values()
    folders = [entry for entry in entries if entry["type"] == "directory"]
    return parts_of_all(_cut_folder, storage, folder, folders)


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


LAYOUT = Layout(order=4, detect=_detect, survey=_survey)
