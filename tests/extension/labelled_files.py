"""labels.csv (lines of file,class) beside a folder images/ that holds all files.

Example of a layout. To add it, put this file into ``pipeline/sources/layouts/``. Nothing else
changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.sources.class_order import ordered_classes
from pipeline.sources.layout import Entries, Layout
from pipeline.sources.member import Member
from pipeline.sources.remote import Storage, open_storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import UNIT_FILES, Part, Survey, Unit, fingerprint_items

NAME = "labelled_files"
LABELS = "labels.csv"


def _rows(storage: Storage, root: str) -> list[tuple[str, str]]:
    """(file, class) of every image, in the order of labels.csv."""
    lines = storage.read(f"{root}/{LABELS}").decode().split()
    return [(file, class_id) for file, _, class_id in (line.partition(",") for line in lines)]


def _survey(storage: Storage, root: str, config: SourceConfig) -> Survey:
    rows = _rows(storage, root)
    classes = ordered_classes(storage, root, config, sorted({class_id for _, class_id in rows}))
    units: list[Unit] = []
    for first in range(0, len(rows), UNIT_FILES):
        last = min(first + UNIT_FILES, len(rows))
        part = Part(kind=NAME, path=f"{root}/{LABELS}", first=first, last=last, group="images")
        units.append(Unit(len(units), "", (part,)))
    return Survey(
        layout=NAME,
        classes=classes,
        units=units,
        fingerprint_items=fingerprint_items(root, units),
        notes=[],
    )


def _read(part: Part, config: SourceConfig, labels: Mapping[str, int]) -> Iterator[Member]:
    storage, root = open_storage(config.root)
    for file, class_id in _rows(storage, root)[part.first : part.last]:
        data = storage.read(f"{root}/images/{file}")
        yield Member(key=f"images/{file}", label=labels[class_id], data=data)


def _detect(_storage: Storage, _root: str, _config: SourceConfig, entries: Entries) -> bool:
    return LABELS in entries


LAYOUT = Layout(order=0, detect=_detect, survey=_survey, read=_read)
