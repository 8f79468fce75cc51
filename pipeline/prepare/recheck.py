"""Apply other size limits to a unit that is done, without its source.

The unit keeps all that this takes: kept images lie in its shard, rejected files in the quarantine,
and its table (MEMBER_RECORD) has the size that each image had in the source. Worked example, with
``min_side`` lowered from 32 to 24:

    table          kept, 48 x 40      rejected, 30 x 24      rejected, 48 x 40
    before         row 0              too_small              truncated
    now            row 0              row 1                  truncated
    taken from     the shard          the quarantine         the quarantine

The result equals that of extracting the unit again: the files pass in their old order through the
same code. Some units cannot be rechecked and are extracted again: see ``cleaned_again``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.prepare.clean import CHANGES, CleanImage, clean, reject_size
from pipeline.prepare.cleaned_member import CleanedMember
from pipeline.prepare.context import BuildContext
from pipeline.prepare.unit_record import QuarantineEntry, UnitRecord, size_limits
from pipeline.prepare.unit_shard import UnitShard
from pipeline.sources.member import Rejection


class NotEnoughKept(Exception):
    """A file of the unit has to be read from the source."""


def same_verdicts(context: BuildContext, unit: int, record: UnitRecord) -> UnitRecord | None:
    """The record under the present limits if they reject the same images; otherwise None."""
    members = _members(context, unit)
    before = _size_verdicts(members, record.limits)
    now = _size_verdicts(members, size_limits(context.config))
    if (before != now).any():
        return None
    # The findings name the limit.
    rejected_members = members[~members["is_kept"]]
    rejected = [
        _with_finding(entry, member, context)
        for entry, member in zip(record.rejected, rejected_members, strict=True)
    ]
    return replace(record, rejected=rejected, limits=size_limits(context.config))


def cleaned_again(context: BuildContext, unit: int, record: UnitRecord) -> Iterator[CleanedMember]:
    """Every file of a finished unit, with the result that the present limits give.

    Raises:
        NotEnoughKept: a quarantined file was deleted or edited, or an image that is rejected now is
            kept in another form than in the source (converted, for example).
        DataError: an image of the unit's shard changed after it was written.
    """
    members = _members(context, unit)
    shard = UnitShard(context.unit_shard(unit))
    entries = iter(record.rejected)
    row = 0
    for member in members:
        if member["is_kept"]:
            yield _kept_now(context, member, shard, row)
            row += 1
        else:
            yield _rejected_now(context, member, next(entries))
    # No limit concerns files that are no images.
    for entry in record.left_out:
        yield CleanedMember(
            key=entry["key"],
            key_hash=0,
            label=0,
            data=b"",
            result=Rejection(entry["reason"], entry["detail"]),
        )


def _members(context: BuildContext, unit: int) -> NDArray[np.void]:
    try:
        table: NDArray[np.void] = np.load(context.member_records(unit), allow_pickle=False)
    except (FileNotFoundError, ValueError):
        raise NotEnoughKept from None
    return table


def _size_verdicts(members: NDArray[np.void], limits: dict[str, int]) -> NDArray[np.int8]:
    """Per file: 0 within the limits or of unknown size, 1 too many pixels, 2 too small."""
    width = members["width"].astype(np.int64)
    height = members["height"].astype(np.int64)
    is_small = np.minimum(width, height) < limits["min_side"]
    verdicts = np.where(width * height > limits["max_pixels"], 1, np.where(is_small, 2, 0))
    return np.where(width > 0, verdicts, 0).astype(np.int8)


def _with_finding(
    entry: QuarantineEntry, member: np.void, context: BuildContext
) -> QuarantineEntry:
    rejection = reject_size(int(member["width"]), int(member["height"]), context.config)
    if rejection is None or not member["width"]:
        return entry
    return QuarantineEntry(
        key=entry["key"], reason=entry["reason"], detail=rejection.detail, file=entry["file"]
    )


def _kept_now(
    context: BuildContext, member: np.void, shard: UnitShard, number: int
) -> CleanedMember:
    row = shard.row(number)
    size = (int(member["width"]), int(member["height"]))
    change = CHANGES[int(member["change"])]
    result: CleanImage | Rejection | None = reject_size(*size, context.config)
    if result is not None and change:
        raise NotEnoughKept  # the quarantine holds files as they are in the source
    if result is None:
        result = CleanImage(
            data=row.image,
            width=row.width,
            height=row.height,
            changed=change,
            moments=tuple(member["moments"].tolist()),
            source_size=size,
        )
    return CleanedMember(
        key=row.key,
        key_hash=int(member["key"]),
        label=row.label,
        data=row.image,
        result=result,
    )


def _rejected_now(context: BuildContext, member: np.void, entry: QuarantineEntry) -> CleanedMember:
    data = b""
    if entry["file"]:
        try:
            data = (context.quarantine / entry["file"]).read_bytes()
        except OSError:
            raise NotEnoughKept from None
        # Whoever looks at the quarantine may also have edited what is there.
        if xxhash.xxh3_64_intdigest(data) != member["content"]:
            raise NotEnoughKept
    result: CleanImage | Rejection = Rejection(entry["reason"], entry["detail"])
    if member["width"]:
        result = clean(data, entry["key"], context.config)
    return CleanedMember(
        key=entry["key"],
        key_hash=int(member["key"]),
        label=int(member["label"]),
        data=data,
        result=result,
    )
