"""First phase: clean the files of one unit and write them to a shard; quarantine the others.

    source                        work folder                    quarantine
    train/c0.tar, train/c1.tar -> unit-000000.parquet, .idx      truncated/<name>-<hash>.JPEG
                                  unit-000000.npy  (hashes)
                                  unit-000000.members.npy
                                  unit-000000.json (record, written last)

A unit that is done under other size limits is rechecked without its source (`recheck`).

Units are extracted by different workers, in any order. The second phase (`shuffle`) takes rows of
many unit shards.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.data.shards import GROUP_ROWS, Row, write_shard
from pipeline.files import atomic, write_bytes
from pipeline.layout import CLASSES_JSON
from pipeline.prepare import recheck
from pipeline.prepare.clean import CHANGES, CleanImage, clean
from pipeline.prepare.cleaned_member import CleanedMember
from pipeline.prepare.context import BuildContext
from pipeline.prepare.quarantine import quarantined_name
from pipeline.prepare.recheck import NotEnoughKept
from pipeline.prepare.source_content import add_content
from pipeline.prepare.unit_record import (
    IMAGE_RECORD,
    MEMBER_RECORD,
    QuarantineEntry,
    UnitRecord,
    finished_unit,
    size_limits,
)
from pipeline.sources.member import LEFT_OUT, Member, Rejection
from pipeline.sources.reader import members
from pipeline.sources.units import Unit

_SIDE_STEP = 32  # pixels, of the histogram of short sides
_LOW_64_BITS = (1 << 64) - 1
_NO_MOMENTS = (0.0,) * 6  # of a rejected file


@dataclass(frozen=True)
class ExtractedUnit:
    """The record of a unit. ``was_read``: from the source, not taken from an earlier attempt."""

    record: UnitRecord
    was_read: bool


def extract_unit(context: BuildContext, unit: Unit) -> ExtractedUnit:
    """Extract one unit unless it is done. Holds one group of rows in memory at a time.

    Raises:
        DataError: the source cannot be read.
    """
    cv2.setNumThreads(1)  # the tasks are the parallelism
    earlier = finished_unit(context, unit.number)
    if earlier is not None:
        with contextlib.suppress(NotEnoughKept):
            return ExtractedUnit(_rechecked(context, unit.number, earlier), was_read=False)
    record = _write_unit(context, unit.number, _read(context, unit), earlier)
    return ExtractedUnit(record, was_read=True)


def _rechecked(context: BuildContext, unit: int, earlier: UnitRecord) -> UnitRecord:
    """A finished unit under the present size limits. Raises NotEnoughKept."""
    # Without limits: of version 0.1.0, whose work folders belong to one set of limits.
    if earlier.limits in ({}, size_limits(context.config)):
        return earlier
    record = recheck.same_verdicts(context, unit, earlier)
    if record is None:
        cleaned = recheck.cleaned_again(context, unit, earlier)
        return _write_unit(context, unit, cleaned, earlier, earlier.content)
    record.write(context.unit_record(unit))
    return record


def _write_unit(
    context: BuildContext,
    unit: int,
    cleaned: Iterator[CleanedMember],
    earlier: UnitRecord | None,
    content: str | None = None,
) -> UnitRecord:
    """Write the files of a unit from its cleaned members, in place of ``earlier`` ones.

    Args:
        content: digest of the source's files, if the members do not come from there.
    """
    # First: while the files are being replaced, the unit does not count as done. The members may
    # still come from the earlier files; those stay open until they are replaced.
    context.unit_record(unit).unlink(missing_ok=True)
    # Rows stream from the source through the cleaning into the shard, group by group.
    collector = _Collector(context)
    rows = collector.rows(cleaned)
    shard = write_shard(context.unit_shard(unit), _in_groups(rows), context.fingerprint)
    for path, records, kind in (
        (context.image_records(unit), collector.image_records, IMAGE_RECORD),
        (context.member_records(unit), collector.member_records, MEMBER_RECORD),
    ):
        with atomic(path) as file:
            np.save(file, np.array(records, dtype=kind))
    record = UnitRecord(
        images=shard.rows,
        shard=shard,
        rejected=collector.rejected,
        left_out=collector.left_out,
        changed=dict(sorted(collector.changed.items())),
        moments=collector.moments.tolist(),
        sides=dict(sorted(collector.sides.items(), key=lambda item: int(item[0]))),
        limits=size_limits(context.config),
        content=collector.content.hexdigest() if content is None else content,
    )
    # Last: a worker that dies before this line leaves a unit that counts as not done.
    record.write(context.unit_record(unit))
    still_rejected = {entry["file"] for entry in record.rejected}
    for entry in earlier.rejected if earlier is not None else ():
        if entry["file"] and entry["file"] not in still_rejected:
            (context.quarantine / entry["file"]).unlink(missing_ok=True)
    return record


class _Collector:
    """Turns cleaned members into rows, and collects what the unit's record and tables will hold."""

    def __init__(self, context: BuildContext) -> None:
        self.context = context
        self.image_records: list[tuple[int, int, int, int]] = []
        self.member_records: list[tuple[object, ...]] = []
        self.rejected: list[QuarantineEntry] = []
        self.left_out: list[QuarantineEntry] = []
        self.changed: Counter[str] = Counter()
        self.sides: Counter[str] = Counter()
        self.moments: NDArray[np.float64] = np.zeros(6)
        self.content = xxhash.xxh3_128()

    def rows(self, cleaned: Iterator[CleanedMember]) -> Iterator[Row]:
        for member in cleaned:
            add_content(self.content, member.key, member.data)
            if isinstance(member.result, Rejection) and member.result.reason == LEFT_OUT:
                self.left_out.append(
                    QuarantineEntry(
                        key=member.key, reason=LEFT_OUT, detail=member.result.detail, file=""
                    )
                )
            elif isinstance(member.result, Rejection):
                self._quarantine(member, member.result)
            else:
                yield self._keep(member, member.result)

    def _keep(self, member: CleanedMember, image: CleanImage) -> Row:
        # The hash is of the cleaned bytes: a gzipped copy of an image is a duplicate of it.
        content = xxhash.xxh3_128_intdigest(image.data)
        key_hash = member.key_hash
        label = member.label
        self.image_records.append((content >> 64, content & _LOW_64_BITS, key_hash, label))
        change = CHANGES.index(image.changed)
        self.member_records.append(
            (True, key_hash, label, *image.source_size, change, image.moments, 0)
        )
        self.sides[str(min(image.width, image.height) // _SIDE_STEP * _SIDE_STEP)] += 1
        self.moments += image.moments
        if image.changed:
            self.changed[image.changed] += 1
        return Row(
            key=member.key,
            label=label,
            width=image.width,
            height=image.height,
            hash=f"{content:032x}",
            image=image.data,
        )

    def _quarantine(self, member: CleanedMember, rejection: Rejection) -> None:
        file = ""
        if member.data:
            file = f"{rejection.reason}/{quarantined_name(member.key, member.data)}"
            write_bytes(self.context.quarantine / file, member.data)
        self.rejected.append(
            QuarantineEntry(
                key=member.key, reason=rejection.reason, detail=rejection.detail, file=file
            )
        )
        content = xxhash.xxh3_64_intdigest(member.data)
        self.member_records.append(
            (False, member.key_hash, member.label, *rejection.size, 0, _NO_MOMENTS, content)
        )


def _read(context: BuildContext, unit: Unit) -> Iterator[CleanedMember]:
    """Every file of a unit, read from the source and cleaned."""
    for member in unit_members(context, unit):
        # With the seed: another seed shuffles the dataset differently.
        yield CleanedMember(
            key=printable(member.key),
            key_hash=xxhash.xxh3_64_intdigest(_key_bytes(member), context.seed),
            label=member.label,
            data=member.data,
            result=member.rejection or clean(member.data, member.key, context.config),
        )


def unit_members(context: BuildContext, unit: Unit) -> Iterator[Member]:
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


def printable(key: str) -> str:
    """The key as text that can be written to JSON and Parquet."""
    return key.encode("utf-8", "backslashreplace").decode()
