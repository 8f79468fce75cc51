"""Keyed permutations of [0, size) with no table: where any number goes is computed from it alone.

A Feistel network on the grid ``rows x columns`` that just holds [0, size) (each round adds a hash of one coordinate to the
other, modulo its extent) is a bijection of the grid; cells that leave [0, size) are sent round again until they are back
inside (cycle walking; Black and Rogaway: Ciphers with Arbitrary Finite Domains, 2002). Fewer than ``rows`` cells lie
outside, so that a second walk is rare.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from pipeline.data.hashing import GOLDEN, MASK, key_of, mix, mix_array

ROUNDS = 8
Words = NDArray[np.uint64]


@functools.lru_cache(maxsize=64)
def round_keys(*parts: int | str) -> Words:
    """The keys of one permutation: uint64 (ROUNDS, 1)."""
    return np.array([[key_of(*parts, number)] for number in range(ROUNDS)], dtype=np.uint64)


def permute(cells: Words, sizes: Words, keys: Words) -> NDArray[np.int64]:
    """Where each of ``cells`` goes: int64 (n,).

    Args:
        cells: uint64 (n,), each below its size.
        sizes: uint64, (1,) for one permutation, or (n,) for one of its own for each cell; at least 1, below 2**50.
        keys: uint64, (ROUNDS, 1) or (ROUNDS, n), likewise.
    """
    rows = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)
    columns = (sizes + rows - np.uint64(1)) // rows
    cells = _network(cells, rows, columns, keys)
    while len(outside := np.nonzero(cells >= sizes)[0]):
        own = outside if len(sizes) > 1 else slice(None)
        again = outside if keys.shape[1] > 1 else slice(None)
        cells[outside] = _network(cells[outside], rows[own], columns[own], keys[:, again])
    return cells.astype(np.int64)


def permute_one(cell: int, size: int, keys: Words) -> int:
    """`permute` of a single number under one permutation, some ten times faster."""
    rows = int(np.ceil(np.sqrt(float(size))))
    columns = -(-size // rows)
    while True:
        row, column = divmod(cell, columns)
        for number, key in enumerate(keys[:, 0].tolist()):
            if number % 2 == 0:
                row = (row + mix((column * GOLDEN + key) & MASK) % rows) % rows
            else:
                column = (column + mix((row * GOLDEN + key) & MASK) % columns) % columns
        cell = row * columns + column
        if cell < size:
            return cell


def _network(cells: Words, rows: Words, columns: Words, keys: Words) -> Words:
    golden = np.uint64(GOLDEN)
    row, column = cells // columns, cells % columns
    for number, key in enumerate(keys):
        # The hash is reduced first: the plain sum could pass 2**64, which integers do not mind and uint64 does.
        if number % 2 == 0:
            row = (row + mix_array(column * golden + key) % rows) % rows
        else:
            column = (column + mix_array(row * golden + key) % columns) % columns
    return row * columns + column
