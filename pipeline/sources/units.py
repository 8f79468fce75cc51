"""Units of work: stretches of a source, a function of it alone, so that any number of workers makes the same dataset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

UNIT_BYTES = 16 << 20
UNIT_FILES = 512

SplitName = Literal["train", "validation", ""]  # "": decided image by image


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a source: bytes [first, last) of a tar, files [first, last) of a sorted folder, or rows of a dataset."""

    kind: Literal["tar", "folder", "huggingface"]
    path: str  # within the source's file system
    first: int
    last: int
    group: str  # class, or split, that keys of its images begin with
    label: int = -1  # class index, where all images are of one class
    labels: tuple[int, ...] = ()  # class index of each member, in order, where they are not
    size: int = 0  # bytes, about


@dataclass(frozen=True, slots=True)
class Unit:
    """What one task reads."""

    number: int
    split: SplitName
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Survey:
    """A source as found. ``classes``: (id, name) in the order of labels; ``listing``: what its fingerprint is of."""

    layout: str
    classes: list[tuple[str, str]]
    units: list[Unit]
    listing: list[tuple[Any, ...]]
    notes: list[str]


def bundle(parts: Iterable[Part], split: SplitName, number: int) -> list[Unit]:
    """Small parts together, up to UNIT_BYTES; ``number``: of the first unit."""
    units: list[Unit] = []
    gathered: list[Part] = []
    for part in parts:
        if gathered and sum(one.size for one in gathered) + part.size > UNIT_BYTES:
            units.append(Unit(number + len(units), split, tuple(gathered)))
            gathered = []
        gathered.append(part)
    return [*units, Unit(number + len(units), split, tuple(gathered))] if gathered else units


def listing(root: str, units: Iterable[Unit]) -> list[tuple[Any, ...]]:
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
