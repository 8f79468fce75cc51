"""Reads the shard of one unit, row by row in any order."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.shards import Row, index_path
from pipeline.errors import DataError
from pipeline.files import digest

_COLUMNS = ["key", "label", "width", "height", "hash"]


class UnitShard:
    """A unit's shard, mapped into memory: reading a row does not read the rows before it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with pq.ParquetFile(path) as parquet:
            table = parquet.read(columns=_COLUMNS, use_threads=False)
        self._columns = [table[name] for name in _COLUMNS]
        self._index: NDArray[np.int64] = np.load(index_path(path), allow_pickle=False)
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def row(self, number: int) -> Row:
        """A row, checked against its hash."""
        key, label, width, height, expected = (column[number].as_py() for column in self._columns)
        offset = int(self._index[0, number])
        length = int(self._index[1, number])
        image = self._map[offset : offset + length]
        if digest(image) != expected:
            raise DataError(
                f"checksum mismatch: row {number} changed after it was written",
                place=str(self.path),
                remedy=f"check the disk; delete {self.path} and rerun the same command",
            )
        return Row(key=key, label=label, width=width, height=height, hash=expected, image=image)
