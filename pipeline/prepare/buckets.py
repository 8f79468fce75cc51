"""Records spilled into files by a hash, so that a set of any size is sorted and decided on a bucket at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BUCKET_ROWS = 1 << 20  # about; hashes spread evenly


def bucket_count(rows: int) -> int:
    """Buckets for so many records. At most 65,536, beyond which they grow: 69 billion records."""
    return min(max(1, -(-rows // BUCKET_ROWS)), 1 << 16)


class Buckets:
    """Files of records. Bucket i takes the i-th of ``count`` equal ranges of the 64-bit hash ``field``: all records of one
    hash are in one bucket, and sorted buckets one after the other are all records sorted."""

    def __init__(self, folder: Path, field: str, count: int, dtype: np.dtype[np.void]) -> None:
        self._field, self._dtype = field, dtype
        self._paths = [folder / f"{field}-{number:05d}" for number in range(count)]
        for path in self._paths:
            path.touch()

    def add(self, records: NDArray[np.void]) -> None:
        """Append records to their buckets, where they keep their order. A file is open only while it is written to."""
        high = records[self._field] >> np.uint64(32)
        bucket = (high * np.uint64(len(self._paths)) >> np.uint64(32)).astype(np.uint16)
        records = records[np.argsort(bucket, kind="stable")]
        ends = np.cumsum(np.bincount(bucket, minlength=len(self._paths)))
        for path, part in zip(self._paths, np.split(records, ends[:-1]), strict=True):
            if len(part):
                with open(path, "ab") as file:
                    file.write(part.tobytes())

    def __iter__(self) -> Iterator[NDArray[np.void]]:
        """The records of each bucket, in the order in which they came. Once: a file read is a file removed."""
        for path in self._paths:
            records: NDArray[np.void] = np.fromfile(path, dtype=self._dtype)
            path.unlink()
            yield records
