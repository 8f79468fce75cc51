"""Counter-based random numbers: each is a pure function of a key and a counter, the same in NumPy and in plain integers.

The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
`pipeline.data.rng` is the same function on a device.
"""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)


def key_of(*parts: int | str) -> int:
    """A 64-bit key from integers and names, in their order."""
    return xxhash.xxh3_64_intdigest("\x1f".join(str(part) for part in parts).encode())


def mix(x: int) -> int:
    """A bijection on 64-bit integers in which every input bit moves every output bit."""
    x = ((x ^ (x >> SHIFTS[0])) * MULTIPLIERS[0]) & MASK
    x = ((x ^ (x >> SHIFTS[1])) * MULTIPLIERS[1]) & MASK
    return x ^ (x >> SHIFTS[2])


def mix_array(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix` of each element."""
    x = (x ^ (x >> np.uint64(SHIFTS[0]))) * np.uint64(MULTIPLIERS[0])
    x = (x ^ (x >> np.uint64(SHIFTS[1]))) * np.uint64(MULTIPLIERS[1])
    return x ^ (x >> np.uint64(SHIFTS[2]))


def uniforms(key: int, samples: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """``count`` numbers in [0, 1), multiples of 2**-24, for each sample: shape (len(samples), count)."""
    states = mix_array(samples.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(key))
    counters = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN))[None, :]
    bits = mix_array(states[:, None] + counters)
    return (bits >> np.uint64(40)).astype(np.float64) * 2.0**-24
