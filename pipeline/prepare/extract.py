"""First phase: the files of one unit, cleaned, in a shard of their own in the work folder; what was rejected, in quarantine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.config.schema import DatasetConfig
from pipeline.data.shards import GROUP_ROWS, Row, ShardInfo, write_shard
from pipeline.files import atomic, digest, write_bytes, write_json
from pipeline.layout import CLASSES_JSON
from pipeline.prepare.clean import Kept, clean
from pipeline.sources.reader import Member, Rejection, members
from pipeline.sources.units import Unit

# What the plan needs to know of a row: its content (xxh3-128 in halves), its key (xxh3-64 with the seed) and label.
FACTS = np.dtype([("high", "<u8"), ("low", "<u8"), ("key", "<u8"), ("label", "<i4")])


@dataclass(frozen=True)
class BuildContext:
    """Where one dataset is made, and how."""

    target: Path
    config: DatasetConfig
    fingerprint: str
    seed: int

    @property
    def work(self) -> Path:
        """Folder of what is removed when the dataset is complete."""
        return self.target / "work"

    @property
    def quarantine(self) -> Path:
        return self.target / "quarantine"

    def spill(self, unit: int) -> Path:
        return self.work / f"unit-{unit:06d}.parquet"

    def record(self, unit: int) -> Path:
        """Written last: the unit is done."""
        return self.work / f"unit-{unit:06d}.json"

    def facts(self, unit: int) -> Path:
        return self.work / f"unit-{unit:06d}.npy"

    @property
    def fates(self) -> Path:
        """One byte for each image of all units: whether the plan keeps it, or why not."""
        return self.work / "fates.npy"

    def order(self, split: str) -> Path:
        """Unit and row of each image of a split, in the order of its shards."""
        return self.work / f"{split}.order"


@dataclass(frozen=True)
class UnitRecord:
    """What a unit came to. ``moments``: sums over its images (see ``Kept``); ``sides``: images by short side in steps of 32."""

    images: int
    shard: dict[str, Any]
    rejected: list[dict[str, str]]
    changed: dict[str, int]
    moments: list[float]
    sides: dict[str, int]


def read_record(place: BuildContext, unit: int) -> UnitRecord | None:
    """The record of a finished unit; None where it has to be made (again)."""
    try:
        record = UnitRecord(**json.loads(place.record(unit).read_text()))
        complete = (
            place.spill(unit).stat().st_size == record.shard["bytes"] and place.facts(unit).exists()
        )
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return record if complete else None


class _Tally:
    """Rows on their way into a spill, and what is counted on the way."""

    def __init__(self, place: BuildContext) -> None:
        self.place = place
        self.facts: list[tuple[int, int, int, int]] = []
        self.rejected: list[dict[str, str]] = []
        self.changed: Counter[str] = Counter()
        self.sides: Counter[str] = Counter()
        self.moments: NDArray[np.float64] = np.zeros(6)

    def rows(self, found: Iterator[Member]) -> Iterator[Row]:
        for member in found:
            judged = member.rejection or clean(member.data, member.key, self.place.config)
            if isinstance(judged, Rejection):
                self._reject(member, judged)
            else:
                yield self._keep(member, judged)

    def _keep(self, member: Member, kept: Kept) -> Row:
        content = xxhash.xxh3_128_intdigest(kept.data)
        key = xxhash.xxh3_64_intdigest(
            member.key.encode("utf-8", "surrogateescape"), self.place.seed
        )
        self.facts.append((content >> 64, content & (1 << 64) - 1, key, member.label))
        self.sides[str(min(kept.width, kept.height) // 32 * 32)] += 1
        self.moments += kept.moments
        if kept.changed:
            self.changed[kept.changed] += 1
        return Row(
            _text(member.key), member.label, kept.width, kept.height, f"{content:032x}", kept.data
        )

    def _reject(self, member: Member, why: Rejection) -> None:
        name = digest(member.key.encode("utf-8", "surrogateescape"))[:16]
        file = f"{why.reason}/{name}" if member.data else ""
        if file:
            write_bytes(self.place.quarantine / file, member.data)
        self.rejected.append(
            {"key": _text(member.key), "reason": why.reason, "detail": why.detail, "file": file}
        )


def spill_unit(place: BuildContext, unit: Unit) -> UnitRecord:
    """Read, clean and write down one unit; one group of rows in memory at a time."""
    cv2.setNumThreads(1)  # tasks are the parallelism
    done = read_record(place, unit.number)
    if done is not None:
        return done
    tally = _Tally(place)
    classes = {
        entry["id"]: entry["index"]
        for entry in json.loads((place.target / CLASSES_JSON).read_text())
    }
    found = (
        _in_split(unit, member)
        for part in unit.parts
        for member in members(part, place.config, classes)
    )
    shard: ShardInfo = write_shard(
        place.spill(unit.number), _grouped(tally.rows(found)), place.fingerprint
    )
    with atomic(place.facts(unit.number)) as file:
        np.save(file, np.array(tally.facts, dtype=FACTS))
    record = UnitRecord(
        shard.rows,
        shard.as_dict(),
        tally.rejected,
        dict(sorted(tally.changed.items())),
        tally.moments.tolist(),
        dict(sorted(tally.sides.items(), key=lambda item: int(item[0]))),
    )
    write_json(place.record(unit.number), asdict(record))
    return record


def _in_split(unit: Unit, member: Member) -> Member:
    """Splits of one source may use the same names."""
    return replace(member, key=f"{unit.split}/{member.key}") if unit.split else member


def _grouped(rows: Iterator[Row]) -> Iterator[Sequence[Row]]:
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == GROUP_ROWS:
            yield group
            group = []
    if group:
        yield group


def _text(key: str) -> str:
    """A name from an archive may hold bytes that are no text."""
    return key.encode("utf-8", "backslashreplace").decode()
