"""``quarantine/rejected.jsonl``: every image that is not in the shards, with its reason; written unit by unit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.files import atomic
from pipeline.prepare.extract import BuildContext
from pipeline.prepare.plan import REASONS, DatasetPlan
from pipeline.sources.units import Unit


def list_rejected(
    place: BuildContext, units: Sequence[Unit], images: NDArray[np.int64], plan: DatasetPlan
) -> None:
    """First what the units rejected, then what the plan dropped, by reason; ``images``: kept of each unit."""
    with atomic(place.quarantine / "rejected.jsonl") as file:
        for entry in itertools.chain(_unusable(place, units), _dropped(place, units, images, plan)):
            file.write((json.dumps(entry) + "\n").encode())


def _unusable(place: BuildContext, units: Sequence[Unit]) -> Iterator[dict[str, Any]]:
    for unit in units:
        yield from json.loads(place.record(unit.number).read_text())["rejected"]


def _dropped(
    place: BuildContext, units: Sequence[Unit], images: NDArray[np.int64], plan: DatasetPlan
) -> Iterator[dict[str, Any]]:
    fates = np.load(place.fates, mmap_mode="r", allow_pickle=False)
    ends = np.cumsum(images)
    for fate, reason in enumerate(REASONS, 1):
        if reason not in plan.dropped:
            continue
        for unit, end, count in zip(units, ends.tolist(), images.tolist(), strict=True):
            rows = np.flatnonzero(fates[end - count : end] == fate)
            keys = _keys(place.spill(unit.number)) if len(rows) else []
            yield from (
                {"key": keys[row], "reason": reason, "detail": "", "file": ""}
                for row in rows.tolist()
            )


def _keys(spill: Path) -> list[str]:
    with pq.ParquetFile(spill) as file:
        keys: list[str] = file.read(columns=["key"], use_threads=False)["key"].to_pylist()
    return keys
