"""The fixed-point residual stream: exact sums, and a product with alpha whose lost bits are kept.

A value is an int32 multiple of 2**-18 (range +-8192). With a = |alpha| on a grid of 2**-18, everything in float64, where
product and quotient are exact to the last integer:

    forward   p = floor(a * c_prev + 1/2)          added (with alpha's sign) to quantize(F)
              r = c_prev - ceil((p - 1/2) / a)     0 <= r < ceil(1/a): which of the integers that give this p
    backward  c_prev = ceil((p - 1/2) / a) + r

so r takes ceil(log2(ceil(1/a))) bits: none for a >= 1, one at the initial 0.5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FRACTION_BITS = 18
SCALE = float(1 << FRACTION_BITS)
ALPHA_LIMIT = 1e-3
WIDTHS = (0, 1, 2, 4, 8, 16)


def quantize(f: Tensor) -> Tensor:
    """Nearest multiple of 2**-18, as a whole float64."""
    return torch.floor(f.double() * SCALE + 0.5)


def to_float(c: Tensor, dtype: torch.dtype) -> Tensor:
    """Stream (int32) -> value."""
    return (c.double() * (1.0 / SCALE)).to(dtype)


def split_alpha(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """alpha (C,) -> (magnitude on the grid, at least 1e-3; sign, +1 at 0), both float64."""
    a = alpha.detach().double()
    magnitude = (torch.floor(a.abs() * SCALE + 0.5) / SCALE).clamp(min=math.ceil(ALPHA_LIMIT * SCALE) / SCALE)
    return magnitude, torch.where(a < 0, -1.0, 1.0).to(a.dtype)


def remainder_width(smallest: float) -> int:
    """Bits that a remainder needs where the smallest magnitude of alpha is ``smallest``."""
    values = math.ceil(1.0 / max(smallest, ALPHA_LIMIT / 2))
    return next(width for width in WIDTHS if values <= 1 << width)


def encode(f: Tensor, previous: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """F (float) and c_prev (int32) -> (c int32, remainder int32)."""
    a, sign = split_alpha(alpha)
    c = previous.double()
    p = torch.floor(a * c + 0.5)
    remainder = (c - torch.ceil((p - 0.5) / a)).to(torch.int32)
    return (quantize(f) + sign * p).to(torch.int32), remainder


def decode(f: Tensor, current: Tensor, remainder: Tensor, alpha: Tensor) -> Tensor:
    """F, c (int32) and the remainder -> c_prev (int32)."""
    a, sign = split_alpha(alpha)
    p = sign * (current.double() - quantize(f))
    return torch.ceil((p - 0.5) / a).to(torch.int32) + remainder


def pack(remainder: Tensor, width: int) -> Tensor:
    """Non-negative integers of ``width`` bits -> the smallest tensor of bytes that holds them."""
    if width == 0:
        return remainder.new_empty(0, dtype=torch.uint8)
    if width == 16:
        return (remainder - 32768).to(torch.int16).flatten()
    per_byte = 8 // width
    flat = remainder.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % per_byte)).view(per_byte, -1)
    packed = flat[0].clone()
    for i in range(1, per_byte):
        packed |= flat[i] << (i * width)
    return packed


def unpack(packed: Tensor, width: int, shape: torch.Size) -> Tensor:
    """Inverse of ``pack``: int32 of ``shape``."""
    if width == 0:
        return torch.zeros((), dtype=torch.int32, device=packed.device)
    if width == 16:
        return (packed.to(torch.int32) + 32768).view(shape)
    mask = (1 << width) - 1
    parts = [(packed >> (i * width)) & mask for i in range(8 // width)]
    return torch.cat(parts)[: shape.numel()].view(shape).to(torch.int32)
