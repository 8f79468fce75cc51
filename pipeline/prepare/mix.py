"""Second phase: one final shard from rows of many units, so that every shard is a random sample of all classes."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.shards import GROUP_ROWS, Row, ShardInfo, index_path, write_shard
from pipeline.errors import DataError
from pipeline.files import atomic, digest, file_digest, write_json
from pipeline.prepare.plan import ShardPlan
from pipeline.prepare.spill import Place

_FACTS = ["key", "label", "width", "height", "hash"]


class _Spill:
    """A unit's shard, mapped: rows are read without reading what lies between them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        table = pq.read_table(path, columns=_FACTS)
        self._columns = [table[name].to_pylist() for name in _FACTS]
        self._index: NDArray[np.int64] = np.load(index_path(path), mmap_mode="r", allow_pickle=False)
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def row(self, number: int) -> Row:
        key, label, width, height, hashed = (column[number] for column in self._columns)
        offset, length = int(self._index[0, number]), int(self._index[1, number])
        image = self._map[offset : offset + length]
        if digest(image) != hashed:
            remedy = f"delete {self.path} and run the stage again; check the disk"
            raise DataError(f"row {number} is not what was written", place=str(self.path), remedy=remedy)
        return Row(key, label, width, height, hashed, image)


def keep_plan(place: Place, shard: ShardPlan) -> None:
    """Write down which rows a shard takes, for the task that makes it."""
    with atomic(_plan_path(place, shard.file)) as file:
        np.save(file, shard.rows)


def mix_shard(place: Place, file: str) -> ShardInfo:
    """Make one shard by its plan; nothing to do where an earlier attempt has made it."""
    target, record = place.target / file, place.work / f"{file}.json"
    rows: NDArray[np.int64] = np.load(_plan_path(place, file), allow_pickle=False)
    done = _finished(target, record)
    if done is not None:
        return done
    info = write_shard(target, _groups(place, rows), place.fingerprint)
    write_json(record, info.as_dict())
    return info


def _plan_path(place: Place, file: str) -> Path:
    return place.work / f"{file}.npy"


def _finished(target: Path, record: Path) -> ShardInfo | None:
    try:
        info = ShardInfo(**json.loads(record.read_text()))
        same = file_digest(target) == info.digest and file_digest(index_path(target)) == info.index_digest
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return info if same else None


def _groups(place: Place, rows: NDArray[np.int64]) -> Iterator[Sequence[Row]]:
    spills: dict[int, Any] = {}
    for start in range(0, rows.shape[1], GROUP_ROWS):
        group = []
        for unit, row in rows[:, start : start + GROUP_ROWS].T.tolist():
            if unit not in spills:
                spills[unit] = _Spill(place.spill(unit))
            group.append(spills[unit].row(row))
        yield group
