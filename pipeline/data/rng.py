"""Counter-based random numbers on any device: the torch twin of `pipeline.data.hashing`."""

from __future__ import annotations

import torch

from pipeline.data.hashing import GOLDEN, MULTIPLIERS, SHIFTS, key_of


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift (torch's is arithmetic on int64)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, SHIFTS[0])) * _signed(MULTIPLIERS[0])
    x = (x ^ _shift(x, SHIFTS[1])) * _signed(MULTIPLIERS[1])
    return x ^ _shift(x, SHIFTS[2])


def uniform(seed: int, epoch: int, samples: torch.Tensor, stream: str, count: int) -> torch.Tensor:
    """Random numbers as a pure function of their arguments, the same on every device, without a host sync.

    Args:
        samples: int64, shape (n,); what the numbers belong to, on the device where they are wanted.
        stream: name of the use, so that two uses are independent.
        count: numbers for each sample.
    Returns:
        float32, shape (n, count), uniform on [0, 1) in steps of 2**-24.
    """
    states = _mix(samples * _signed(GOLDEN) + _signed(key_of(stream, seed, epoch)))
    counters = torch.arange(1, count + 1, device=samples.device) * _signed(GOLDEN)
    return _shift(_mix(states[:, None] + counters), 40).to(torch.float32) * 2.0**-24
