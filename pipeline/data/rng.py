"""Counter-based random numbers on any device: `pipeline.data.hashing` in torch, bit for bit."""

from __future__ import annotations

import torch

from pipeline.data.hashing import GOLDEN, MULTIPLIERS, SHIFTS, key_of


def _signed(value: int) -> int:
    """The int64 that has the same 64 bits: torch has no complete uint64 arithmetic."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _logical_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift that fills with zeros."""
    # torch shifts int64 arithmetically, which copies the sign bit; the mask clears the copies.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _logical_shift(x, SHIFTS[0])) * _signed(MULTIPLIERS[0])
    x = (x ^ _logical_shift(x, SHIFTS[1])) * _signed(MULTIPLIERS[1])
    return x ^ _logical_shift(x, SHIFTS[2])


def uniform(seed: int, epoch: int, samples: torch.Tensor, stream: str, count: int) -> torch.Tensor:
    """Random numbers as a pure function of their arguments, equal on every device.

    They are computed on the device of ``samples`` without waiting for it.

    Args:
        samples: int64, shape (n,): samples, views or positions, whichever the numbers belong to.
        stream: name of the use; the numbers of two uses are independent.
        count: numbers per sample.
    Returns:
        float32, shape (n, count), uniform on [0, 1) in steps of 2**-24.
    """
    # int64 arithmetic wraps around like uint64: sums and products have the same low 64 bits.
    states = _mix(samples * _signed(GOLDEN) + _signed(key_of(stream, seed, epoch)))
    counters = torch.arange(1, count + 1, device=samples.device) * _signed(GOLDEN)
    return _logical_shift(_mix(states[:, None] + counters), 40).to(torch.float32) * 2.0**-24
