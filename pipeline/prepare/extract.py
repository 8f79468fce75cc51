"""First phase: clean the files of one unit and write them to a shard; quarantine the others.

    source                        work folder                    quarantine
    train/c0.tar, train/c1.tar -> unit-000000.parquet, .idx      truncated/<hash of the key>
                                  unit-000000.npy  (hashes)
                                  unit-000000.json (record, written last)

Units are extracted by different workers, in any order. The second phase (`shuffle`) takes rows of
many unit shards.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import cv2
import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.data.shards import GROUP_ROWS, Row, write_shard
from pipeline.files import atomic, digest, write_bytes
from pipeline.layout import CLASSES_JSON
from pipeline.prepare.clean import CleanImage, clean
from pipeline.prepare.context import BuildContext
from pipeline.prepare.unit_record import (
    IMAGE_RECORD,
    QuarantineEntry,
    UnitRecord,
    finished_unit,
)
from pipeline.sources.member import Member, Rejection
from pipeline.sources.reader import members
from pipeline.sources.units import Unit

_SIDE_STEP = 32  # pixels, of the histogram of short sides
_LOW_64_BITS = (1 << 64) - 1


def extract_unit(context: BuildContext, unit: Unit) -> UnitRecord:
    """Extract one unit unless it is done. Holds one group of rows in memory at a time.

    Raises:
        DataError: the source cannot be read.
    """
    cv2.setNumThreads(1)  # the tasks are the parallelism
    finished = finished_unit(context, unit.number)
    if finished is not None:
        return finished
    # Rows stream from the source through the cleaning into the shard, group by group.
    collector = _Collector(context)
    rows = collector.rows(_members(context, unit))
    shard = write_shard(context.unit_shard(unit.number), _in_groups(rows), context.fingerprint)
    with atomic(context.image_records(unit.number)) as file:
        np.save(file, np.array(collector.image_records, dtype=IMAGE_RECORD))
    record = UnitRecord(
        images=shard.rows,
        shard=shard,
        rejected=collector.rejected,
        changed=dict(sorted(collector.changed.items())),
        moments=collector.moments.tolist(),
        sides=dict(sorted(collector.sides.items(), key=lambda item: int(item[0]))),
    )
    # Last: a worker that dies before this line leaves a unit that counts as not done.
    record.write(context.unit_record(unit.number))
    return record


class _Collector:
    """Cleans members into rows, and collects what the unit's record will hold."""

    def __init__(self, context: BuildContext) -> None:
        self.context = context
        self.image_records: list[tuple[int, int, int, int]] = []
        self.rejected: list[QuarantineEntry] = []
        self.changed: Counter[str] = Counter()
        self.sides: Counter[str] = Counter()
        self.moments: NDArray[np.float64] = np.zeros(6)

    def rows(self, unit_members: Iterator[Member]) -> Iterator[Row]:
        for member in unit_members:
            result = member.rejection or clean(member.data, member.key, self.context.config)
            if isinstance(result, Rejection):
                self._quarantine(member, result)
            else:
                yield self._keep(member, result)

    def _keep(self, member: Member, image: CleanImage) -> Row:
        # The hash is of the cleaned bytes: a gzipped copy of an image is a duplicate of it.
        content = xxhash.xxh3_128_intdigest(image.data)
        # With the seed: another seed shuffles the dataset differently.
        key = xxhash.xxh3_64_intdigest(_key_bytes(member), self.context.seed)
        self.image_records.append((content >> 64, content & _LOW_64_BITS, key, member.label))
        self.sides[str(min(image.width, image.height) // _SIDE_STEP * _SIDE_STEP)] += 1
        self.moments += image.moments
        if image.changed:
            self.changed[image.changed] += 1
        return Row(
            key=_printable(member.key),
            label=member.label,
            width=image.width,
            height=image.height,
            hash=f"{content:032x}",
            image=image.data,
        )

    def _quarantine(self, member: Member, rejection: Rejection) -> None:
        # The name in the quarantine is a hash: the key comes from the archive and may be any path.
        file = ""
        if member.data:
            file = f"{rejection.reason}/{digest(_key_bytes(member))[:16]}"
            write_bytes(self.context.quarantine / file, member.data)
        self.rejected.append(
            QuarantineEntry(
                key=_printable(member.key),
                reason=rejection.reason,
                detail=rejection.detail,
                file=file,
            )
        )


def _members(context: BuildContext, unit: Unit) -> Iterator[Member]:
    """The members of a unit, with the split in their keys: both splits may use the same names."""
    classes = {
        entry["id"]: entry["index"]
        for entry in json.loads((context.target / CLASSES_JSON).read_text())
    }
    for part in unit.parts:
        for member in members(part, context.config, classes):
            if unit.split:
                yield replace(member, key=f"{unit.split}/{member.key}")
            else:
                yield member


def _in_groups(rows: Iterator[Row]) -> Iterator[Sequence[Row]]:
    """Rows in lists of GROUP_ROWS, one list in memory at a time."""
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == GROUP_ROWS:
            yield group
            group = []
    if group:
        yield group


def _key_bytes(member: Member) -> bytes:
    """The key as bytes.

    A name in an archive may not be UTF-8; surrogates stand for its odd bytes.
    """
    return member.key.encode("utf-8", "surrogateescape")


def _printable(key: str) -> str:
    """The key as text that can be written to JSON and Parquet."""
    return key.encode("utf-8", "backslashreplace").decode()
