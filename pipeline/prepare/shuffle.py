"""Second phase: one final shard from rows of many units, so that every shard is a random sample of all classes."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.shards import GROUP_ROWS, Row, ShardInfo, index_path, write_shard
from pipeline.errors import DataError
from pipeline.files import digest, file_digest, write_json
from pipeline.prepare.extract import BuildContext
from pipeline.prepare.plan import ShardPlan, read_order

OPEN_SPILLS = 256  # at once: a shard takes rows of thousands, and each holds an open file
_FACTS = ["key", "label", "width", "height", "hash"]


class _Spill:
    """A unit's shard, mapped: rows are read without reading what lies between them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with pq.ParquetFile(path) as parquet:
            table = parquet.read(columns=_FACTS, use_threads=False)
        self._columns = [table[name] for name in _FACTS]
        self._index: NDArray[np.int64] = np.load(index_path(path), allow_pickle=False)
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def row(self, number: int) -> Row:
        key, label, width, height, hashed = (column[number].as_py() for column in self._columns)
        offset, length = int(self._index[0, number]), int(self._index[1, number])
        image = self._map[offset : offset + length]
        if digest(image) != hashed:
            remedy = f"delete {self.path} and run the stage again; check the disk"
            raise DataError(
                f"row {number} is not what was written", place=str(self.path), remedy=remedy
            )
        return Row(key, label, width, height, hashed, image)


def mix_shard(place: BuildContext, shard: ShardPlan) -> ShardInfo:
    """Make one shard by its plan; nothing to do where an earlier attempt has made it."""
    target, record = place.target / shard.file, place.work / f"{shard.file}.json"
    done = _finished(target, record)
    if done is not None:
        return done
    info = write_shard(target, _groups(place, read_order(place, shard)), place.fingerprint)
    write_json(record, info.as_dict())
    return info


def _finished(target: Path, record: Path) -> ShardInfo | None:
    try:
        info = ShardInfo(**json.loads(record.read_text()))
        same = (
            file_digest(target) == info.digest
            and file_digest(index_path(target)) == info.index_digest
        )
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return info if same else None


def _groups(place: BuildContext, rows: NDArray[np.void]) -> Iterator[Sequence[Row]]:
    spill = lru_cache(OPEN_SPILLS)(lambda unit: _Spill(place.spill(unit)))
    for start in range(0, len(rows), GROUP_ROWS):
        yield [spill(unit).row(row) for unit, row in rows[start : start + GROUP_ROWS].tolist()]
