"""Units of work: stretches of a source, each read by one task.

Units depend on the source alone, never on the number of workers, so any number of workers prepares
the same dataset.

Worked example with ``UNIT_BYTES = 16``, sizes in bytes. A folder holds a.tar (6), b.tar (7), c.tar
(5) and d.tar (90):

    parts   a[0:6]  b[0:7]  c[0:5]  d[0:20]  d[20:38]  ...   d > 4 UNIT_BYTES: cut at headers
    units   0: a, b                                          c would make it 18 > 16
            1: c                                             d[0:20] would make it 25
            2: d[0:20]   3: d[20:38]   ...                   larger than UNIT_BYTES: a unit alone
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

UNIT_BYTES = 16 << 20
UNIT_FILES = 512

SplitName = Literal["train", "validation", "test", ""]  # "": decided per image, by its content

# JSON values that identify a stretch of a source in the dataset's fingerprint.
FingerprintItem = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch [first, last) of a source: bytes of a tar, files of a folder (sorted), or rows."""

    kind: str  # "tar", "folder", or the name of the layout that reads it
    path: str  # within the source's file system
    first: int
    last: int
    group: str  # class or split; the keys of the images begin with it
    label: int = -1  # class index, if all images are of one class
    labels: tuple[int, ...] = ()  # class index per member, in order, if they are not
    size: int = 0  # approximate number of bytes
    images: int | None = None  # files that may be images; None: unknown (a tar)


@dataclass(frozen=True, slots=True)
class Unit:
    """The parts that one task reads."""

    number: int
    split: SplitName
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A source as it was found.

    ``classes``: (id, name) in the order of the labels. ``fingerprint_items``: the part of the
    dataset's fingerprint that stands for the source. ``notes``: warnings for the user.
    """

    layout: str
    classes: list[tuple[str, str]]
    units: list[Unit]
    fingerprint_items: list[FingerprintItem]
    notes: list[str]


def pack_units(parts: Iterable[Part], split: SplitName, first_number: int) -> list[Unit]:
    """Pack consecutive parts into units of at most UNIT_BYTES, numbered from ``first_number``."""
    units: list[Unit] = []
    pending: list[Part] = []
    pending_bytes = 0
    for part in parts:
        # A class may have three images: without packing, tasks would cost more than the work that
        # they carry.
        if pending and pending_bytes + part.size > UNIT_BYTES:
            units.append(Unit(first_number + len(units), split, tuple(pending)))
            pending = []
            pending_bytes = 0
        pending.append(part)
        pending_bytes += part.size
    if pending:
        units.append(Unit(first_number + len(units), split, tuple(pending)))
    return units


def fingerprint_items(root: str, units: Iterable[Unit]) -> list[FingerprintItem]:
    """Names and sizes of a source, relative to its root: a copy elsewhere is the same source."""
    return [
        (
            unit.split,
            part.path.removeprefix(root),
            part.first,
            part.last,
            part.group,
            part.size,
            list(part.labels),
        )
        for unit in units
        for part in unit.parts
    ]
