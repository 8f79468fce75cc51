"""Keyed permutations of [0, size) without a table: any index is permuted on its own.

An epoch over a billion samples must be shuffled without storing a billion numbers. A Feistel
network on a grid does that. The grid has ``rows`` x ``columns`` cells, just enough for the indices.
Each round adds a hash of one coordinate to the other coordinate, modulo its extent. A round can be
undone by subtracting the same hash, so the network is a bijection of the grid.

Worked example: size 10, on a grid of 4 rows and 3 columns.

    index 7                       = row 2, column 1        (7 = 2 * 3 + 1)
    round 0: hash(column 1) is 3    row (2 + 3) % 4 = 1
    round 1: hash(row 1) is 2       column (1 + 2) % 3 = 0
    result                        = 1 * 3 + 0 = 3

(The real network has ROUNDS rounds.) The grid has 12 cells, so the result could be 10 or 11. Such
an index is sent through the network again until it falls inside [0, size): cycle walking (Black and
Rogaway, Ciphers with Arbitrary Finite Domains, 2002). The result is still a bijection. Fewer than
``rows`` cells are outside, so that a second pass is rare for large sizes.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from pipeline.data.hashing import GOLDEN, MASK, key_of, mix, mix_array

ROUNDS = 8
UInt64 = NDArray[np.uint64]


@functools.lru_cache(maxsize=64)
def round_keys(*parts: int | str) -> UInt64:
    """Keys of one permutation, one per round: uint64, shape (ROUNDS, 1)."""
    return np.array([[key_of(*parts, number)] for number in range(ROUNDS)], dtype=np.uint64)


def permute(indices: UInt64, sizes: UInt64, keys: UInt64) -> NDArray[np.int64]:
    """Permute indices, all with one permutation or each with a permutation of its own.

    Args:
        indices: uint64, shape (n,), each below its size.
        sizes: uint64, shape (1,) for one permutation or (n,) for one per index; at least 1, less
            than 2**50, where the square root in float64 is exact enough.
        keys: uint64, shape (ROUNDS, 1) or (ROUNDS, n), likewise.
    Returns:
        int64, shape (n,).
    """
    rows = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)
    columns = (sizes + rows - np.uint64(1)) // rows
    results = _network(indices, rows, columns, keys)
    # Cycle walking: send the results outside [0, size) through the network again. Sizes and keys
    # are selected only where there is one per index.
    while len(outside := np.nonzero(results >= sizes)[0]):
        size_selection = outside if len(sizes) > 1 else slice(None)
        key_selection = outside if keys.shape[1] > 1 else slice(None)
        results[outside] = _network(
            results[outside], rows[size_selection], columns[size_selection], keys[:, key_selection]
        )
    return results.astype(np.int64)


def permute_one(index: int, size: int, keys: UInt64) -> int:
    """`permute` for a single index: the same result, without the overhead of NumPy arrays."""
    rows = int(np.ceil(np.sqrt(float(size))))
    columns = -(-size // rows)
    result = index
    while True:
        row, column = divmod(result, columns)
        for number, key in enumerate(keys[:, 0].tolist()):
            if number % 2 == 0:
                row = (row + mix((column * GOLDEN + key) & MASK) % rows) % rows
            else:
                column = (column + mix((row * GOLDEN + key) & MASK) % columns) % columns
        result = row * columns + column
        if result < size:
            return result


def _network(indices: UInt64, rows: UInt64, columns: UInt64, keys: UInt64) -> UInt64:
    """One pass through the rounds. The results are inside the grid, but may exceed [0, size)."""
    golden = np.uint64(GOLDEN)
    row = indices // columns
    column = indices % columns
    for number, key in enumerate(keys):
        # Reduce the hash before adding it: the plain sum may exceed 2**64, where uint64 wraps
        # around and the integers of `permute_one` do not.
        if number % 2 == 0:
            row = (row + mix_array(column * golden + key) % rows) % rows
        else:
            column = (column + mix_array(row * golden + key) % columns) % columns
    return row * columns + column
