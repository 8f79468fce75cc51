"""Distribute records over files by a hash: a set of any size can be sorted one file at a time.

This is the first half of an external bucket sort. Bucket i takes the i-th of ``count`` equal ranges
of the hash. Worked example with 4 buckets and hashes of 8 bits (0 to 255), records added in the
order 200, 10, 70, 65:

    bucket       0: 0-63    1: 64-127    2: 128-191    3: 192-255
    records      10         70, 65       -             200

Two properties follow. Equal hashes are in the same bucket, so duplicates are found within one
bucket. And buckets that are sorted one by one and put in sequence (10 | 65, 70 | | 200) are all
records, sorted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BUCKET_ROWS = 1 << 20  # records per bucket, approximately: hashes spread evenly
MAX_BUCKETS = 1 << 16


def bucket_count(rows: int) -> int:
    """Number of buckets for so many records. Beyond 69 billion records, buckets grow instead."""
    return min(max(1, -(-rows // BUCKET_ROWS)), MAX_BUCKETS)


class Buckets:
    """Files of records, distributed by the 64-bit hash in ``field``.

    Written first, then read once.
    """

    def __init__(self, folder: Path, field: str, count: int, dtype: np.dtype[np.void]) -> None:
        self._field = field
        self._dtype = dtype
        self._paths = [folder / f"{field}-{number:05d}" for number in range(count)]
        for path in self._paths:
            path.touch()

    def add(self, records: NDArray[np.void]) -> None:
        """Append records to their buckets, where they keep their order."""
        # Bucket = hash * count / 2^64. The upper 32 bits suffice, and their product with ``count``
        # fits in 64 bits.
        upper = records[self._field] >> np.uint64(32)
        bucket = (upper * np.uint64(len(self._paths)) >> np.uint64(32)).astype(np.uint16)
        records = records[np.argsort(bucket, kind="stable")]
        ends = np.cumsum(np.bincount(bucket, minlength=len(self._paths)))
        for path, part in zip(self._paths, np.split(records, ends[:-1]), strict=True):
            if len(part):
                # Open a file only while it is written: 65,536 open files would exceed the limit.
                with open(path, "ab") as file:
                    file.write(part.tobytes())

    def __iter__(self) -> Iterator[NDArray[np.void]]:
        """The records of each bucket, in the order in which they were added.

        Deletes each file after reading it.
        """
        for path in self._paths:
            records: NDArray[np.void] = np.fromfile(path, dtype=self._dtype)
            path.unlink()
            yield records
