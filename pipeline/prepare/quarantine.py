"""Write ``quarantine/rejected.jsonl``: every image that is not in the shards, with its reason."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.files import atomic
from pipeline.prepare.context import BuildContext
from pipeline.prepare.plan import DROP_REASONS, DatasetPlan
from pipeline.prepare.unit_record import QuarantineEntry, UnitRecord
from pipeline.sources.units import Unit


def write_quarantine_list(
    context: BuildContext,
    units: Sequence[Unit],
    images_per_unit: NDArray[np.int64],
    plan: DatasetPlan,
) -> None:
    """List first the files that extraction rejected, then the images that the plan dropped.

    ``images_per_unit``: kept by extraction. Written line by line, so memory does not grow with the
    number of entries.
    """
    entries = itertools.chain(
        _rejected(context, units), _dropped(context, units, images_per_unit, plan)
    )
    with atomic(context.quarantine / "rejected.jsonl") as file:
        for entry in entries:
            file.write((json.dumps(entry) + "\n").encode())


def _rejected(context: BuildContext, units: Sequence[Unit]) -> Iterator[QuarantineEntry]:
    for unit in units:
        yield from UnitRecord.read(context.unit_record(unit.number)).rejected


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
