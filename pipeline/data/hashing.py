"""Counter-based random numbers: each is a pure function of a key and a counter.

A generator with a state would have to be advanced to the right place after a restart, and its
numbers would depend on who drew before. Here any process computes the numbers of any sample
directly, in NumPy and in plain integers with the same result; `pipeline.data.rng` is the same
function in torch.

The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
Generators, 2014).

Example: the numbers of sample 5 in epoch 2 of a run with seed 7 are

    key       key_of("augment", 7, 2)            hash of the bytes b"augment\\x1f7\\x1f2"
    state     mix(5 * GOLDEN + key)              one state per sample
    number 1  mix(state + 1 * GOLDEN) >> 40      its 24 highest bits, times 2**-24: in [0, 1)
    number 2  mix(state + 2 * GOLDEN) >> 40      ... and so on
"""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

MASK = (1 << 64) - 1  # Python's integers do not wrap at 64 bits by themselves
# 2^64 / golden ratio, and odd: the multiples of consecutive counters spread over the range.
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)


def key_of(*parts: int | str) -> int:
    """A 64-bit key from integers and names, which depends on their order."""
    # The separator cannot occur in a name, so ("a", 12) and ("a1", 2) have different keys.
    return xxhash.xxh3_64_intdigest("\x1f".join(str(part) for part in parts).encode())


def mix(x: int) -> int:
    """A bijection of the 64-bit integers in which every input bit affects every output bit."""
    # x ^ (x >> s) and multiplication by an odd number modulo 2^64 can both be inverted.
    x = ((x ^ (x >> SHIFTS[0])) * MULTIPLIERS[0]) & MASK
    x = ((x ^ (x >> SHIFTS[1])) * MULTIPLIERS[1]) & MASK
    return x ^ (x >> SHIFTS[2])


def mix_array(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix` of each element."""
    x = (x ^ (x >> np.uint64(SHIFTS[0]))) * np.uint64(MULTIPLIERS[0])
    x = (x ^ (x >> np.uint64(SHIFTS[1]))) * np.uint64(MULTIPLIERS[1])
    return x ^ (x >> np.uint64(SHIFTS[2]))


def uniforms(key: int, samples: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """``count`` random numbers per sample.

    Args:
        key: from `key_of`; two uses with different keys are independent.
        samples: int64, shape (n,): the numbers of a sample do not depend on the others.
        count: numbers per sample.
    Returns:
        float64, shape (n, count), uniform on [0, 1) in steps of 2**-24.
    """
    states = mix_array(samples.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(key))
    counters = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN))[None, :]
    bits = mix_array(states[:, None] + counters)
    # Keep 24 bits: a float32 holds them exactly, so that NumPy and torch agree bit for bit.
    return (bits >> np.uint64(40)).astype(np.float64) * 2.0**-24
