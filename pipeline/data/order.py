"""The order of an epoch: a permutation of the samples as a pure function of (seed, epoch, position), with no table."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from pipeline.data.hashing import GOLDEN, MASK, key_of, mix, mix_array

ROUNDS = 8


class Order:
    """A keyed permutation of [0, num_samples) for every epoch; any position in O(1) time and memory.

    A Feistel network on the grid ``rows x columns`` that just holds the samples (each round adds a hash of one coordinate
    to the other, modulo its size) is a bijection of the grid; positions that leave [0, num_samples) are sent round again
    until they are back inside (cycle walking; Black and Rogaway: Ciphers with Arbitrary Finite Domains, 2002).
    Fewer than ``rows`` cells lie outside, so that a second walk is rare.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError("an order needs at least one sample")
        self.num_samples, self.seed = num_samples, seed
        self.rows = math.isqrt(num_samples - 1) + 1
        self.columns = -(-num_samples // self.rows)

    def index(self, epoch: int, position: int) -> int:
        """The sample at ``position`` of ``epoch``."""
        if not 0 <= position < self.num_samples:
            raise IndexError(f"position {position} of {self.num_samples} samples")
        keys = _round_keys(self.seed, epoch)
        cell = position
        while True:
            row, column = divmod(cell, self.columns)
            for number, key in enumerate(keys):
                if number % 2 == 0:
                    row = (row + mix((column * GOLDEN + key) & MASK)) % self.rows
                else:
                    column = (column + mix((row * GOLDEN + key) & MASK)) % self.columns
            cell = row * self.columns + column
            if cell < self.num_samples:
                return cell

    def indices(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """The samples at positions [start, stop) of ``epoch``: int64, shape (stop - start,)."""
        if not 0 <= start <= stop <= self.num_samples:
            raise IndexError(f"positions {start} to {stop} of {self.num_samples} samples")
        cells = np.arange(start, stop, dtype=np.uint64)
        outside = np.ones(len(cells), dtype=bool)
        while outside.any():
            cells[outside] = self._encrypt(cells[outside], epoch)
            outside = cells >= self.num_samples
        return cells.astype(np.int64)

    def _encrypt(self, cells: NDArray[np.uint64], epoch: int) -> NDArray[np.uint64]:
        rows, columns, golden = np.uint64(self.rows), np.uint64(self.columns), np.uint64(GOLDEN)
        row, column = cells // columns, cells % columns
        for number, key in enumerate(_round_keys(self.seed, epoch)):
            # The hash is reduced first: the plain sum could pass 2**64, which integers do not mind and uint64 does.
            if number % 2 == 0:
                row = (row + mix_array(column * golden + np.uint64(key)) % rows) % rows
            else:
                column = (column + mix_array(row * golden + np.uint64(key)) % columns) % columns
        return row * columns + column


@functools.lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(key_of("order", seed, epoch, number) for number in range(ROUNDS))
