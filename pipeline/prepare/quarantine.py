"""The quarantine: rejected files under their reason, and a list of all images left out.

quarantine/truncated/bad0-1f3c9a0d27e4b865.JPEG    the file, byte for byte
quarantine/rejected.jsonl                          {"key": "train/c2/bad0.JPEG", "reason": ...}
quarantine/left_out.jsonl                          {"key": "train/c2/README", ...}: no images
"""

from __future__ import annotations

import itertools
import json
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.files import atomic, digest
from pipeline.prepare.context import BuildContext
from pipeline.prepare.plan import DROP_REASONS, DatasetPlan
from pipeline.prepare.unit_record import QuarantineEntry, UnitRecord
from pipeline.sources.units import Unit

_LONGEST_STEM = 100  # bytes; file systems allow 255 for a whole name
_LONGEST_SUFFIX = 10


def quarantined_name(key: str, data: bytes) -> str:
    """The name of a rejected file: its own, with a hash that makes it unique.

    The key comes from an archive and may be any path: only its last part counts, and only letters,
    digits and a few signs of it. Two files may have the same name, and even the same key.

    Example: "train/c2/bad 0.JPEG" -> "bad_0-1f3c9a0d27e4b865.JPEG".
    """
    stem, suffix = posixpath.splitext(key.rsplit("/", 1)[-1])
    if not (suffix[1:].isalnum() and suffix.isascii() and len(suffix) <= _LONGEST_SUFFIX):
        stem += suffix
        suffix = ""
    safe = "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in stem)
    # A leading dot would hide the file, a leading dash look like an option of a command.
    safe = safe.lstrip(".-").encode()[:_LONGEST_STEM].decode(errors="ignore")
    unique = digest(key.encode() + b"\0" + data)[:16]
    return f"{safe or 'file'}-{unique}{suffix}"


def write_quarantine_list(
    context: BuildContext,
    units: Sequence[Unit],
    images_per_unit: NDArray[np.int64],
    plan: DatasetPlan,
) -> None:
    """List first the files that extraction rejected, then the images that the plan dropped.

    ``images_per_unit``: kept by extraction. Every unit is done: files in the quarantine that no
    unit lists come from an attempt that was cut short under other limits, and are deleted.
    """
    dropped = _dropped(context, units, images_per_unit, plan)
    _write_list(context.quarantine_list, itertools.chain(_rejected(context, units), dropped))
    left_out = (entry for record in _records(context, units) for entry in record.left_out)
    _write_list(context.left_out_list, left_out)
    listed = {entry["file"] for entry in _rejected(context, units)}
    for path in context.quarantine.glob("*/*"):
        if f"{path.parent.name}/{path.name}" not in listed:
            path.unlink()


def write_rejections(context: BuildContext, units: Sequence[Unit]) -> None:
    """List the files that extraction has rejected so far, for a preparation that stops here."""
    _write_list(context.quarantine_list, _rejected(context, units))


def _write_list(path: Path, entries: Iterator[QuarantineEntry]) -> None:
    with atomic(path) as file:
        for entry in entries:
            file.write((json.dumps(entry) + "\n").encode())


def _rejected(context: BuildContext, units: Sequence[Unit]) -> Iterator[QuarantineEntry]:
    for record in _records(context, units):
        yield from record.rejected


def _records(context: BuildContext, units: Sequence[Unit]) -> Iterator[UnitRecord]:
    for unit in units:
        path = context.unit_record(unit.number)
        # A preparation that stops early has not read every unit.
        if path.exists():
            yield UnitRecord.read(path)


def _dropped(
    context: BuildContext,
    units: Sequence[Unit],
    images_per_unit: NDArray[np.int64],
    plan: DatasetPlan,
) -> Iterator[QuarantineEntry]:
    # Mapped, not read: one byte per image of all units. Unit u owns [ends[u] - count, ends[u]).
    drop_reasons = np.load(context.drop_reasons, mmap_mode="r", allow_pickle=False)
    ends = np.cumsum(images_per_unit).tolist()
    for code, reason in enumerate(DROP_REASONS, 1):
        if reason not in plan.dropped:
            continue
        for unit, end, count in zip(units, ends, images_per_unit.tolist(), strict=True):
            rows = np.flatnonzero(drop_reasons[end - count : end] == code)
            # Most units drop nothing: their keys need not be read.
            keys = _keys(context.unit_shard(unit.number)) if len(rows) else []
            for row in rows.tolist():
                yield QuarantineEntry(key=keys[row], reason=reason, detail="", file="")


def _keys(shard: Path) -> list[str]:
    with pq.ParquetFile(shard) as file:
        keys: list[str] = file.read(columns=["key"], use_threads=False)["key"].to_pylist()
    return keys
