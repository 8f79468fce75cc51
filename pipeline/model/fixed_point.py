"""The fixed-point residual stream: exact sums, and a product with alpha whose lost bits are kept.

A value is an int32 multiple of 2**-bits (2**-18 by default: range +-8192). With a = |alpha| on a grid of 2**-18,
everything in float64, where product and quotient are exact to the last integer:

    forward   p = floor(a * c_prev + 1/2)          added (with alpha's sign) to quantize(F)
              r = c_prev - ceil((p - 1/2) / a)     0 <= r < ceil(1/a): which of the integers that give this p
    backward  c_prev = ceil((p - 1/2) / a) + r

so r takes ceil(log2(ceil(1/a))) bits: none for a >= 1, one at the initial 0.5.

``start``, ``add``, ``encode``, ``check`` and ``decode`` are the element-wise passes (see ``passes.py``). They see a map as
(positions, channels), move the stream in place, and never wrap: what leaves the range stays at its end, while the value
that they return goes on, so that its size tells how far it is.
Every product and quotient in them is exact or rounded once, so operations and compiled code give the same bits. Sums and
extremes are taken apart from them: a reduction in the same loop would keep compilers from vectorising it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ALPHA_SCALE = float(1 << 18)
ALPHA_LIMIT = 1e-3
WIDTHS = (0, 1, 2, 4, 8, 16)
LAST = float(2**31 - 1)  # the stream's largest integer


def units_of(fraction_bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(integers a unit, unit an integer) as float64 scalars on the device, made there."""
    exponents = (fraction_bits, -fraction_bits)
    scale, step = (torch.full((), 2.0**e, dtype=torch.float64, device=device) for e in exponents)
    return scale, step


def split_alpha(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """alpha (C,) -> (magnitude on the grid, at least 1e-3; sign, +1 at 0), both float64."""
    a = alpha.detach().double()
    steps = torch.floor(a.abs() * ALPHA_SCALE + 0.5).clamp(min=math.ceil(ALPHA_LIMIT * ALPHA_SCALE))
    return steps / ALPHA_SCALE, torch.where(a < 0, -1.0, 1.0).to(a.dtype)


def remainder_width(smallest: float) -> int:
    """Bits that a remainder needs where the smallest magnitude of alpha is ``smallest``."""
    values = math.ceil(1.0 / max(smallest, ALPHA_LIMIT / 2))
    return next(width for width in WIDTHS if values <= 1 << width)


def remainder_dtype(width: int | None) -> torch.dtype:
    """What a remainder is made in before it is packed."""
    return torch.int16 if width is None or width > 8 else torch.uint8


def quantize(f: Tensor, scale: Tensor) -> Tensor:
    """Nearest integer of the stream, as a whole float64."""
    return torch.floor(f.double() * scale + 0.5)


def fingerprint(kept: Tensor) -> Tensor:
    """Sum of a tensor's bits read as integers (int32, wrapping): any one flipped bit changes it."""
    flat = kept.detach().contiguous().view(-1).view(torch.uint8)
    place = flat.storage_offset()
    size = next(size for size in (4, 2, 1) if flat.numel() % size == 0 and place % size == 0)
    return flat.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[size]).sum(dtype=torch.int32)


def bounded(total: Tensor) -> Tensor:
    """Whole float64 numbers within the stream's range: beyond it, and for NaN, its end."""
    # By comparisons, which fail for NaN: compilers make plain vector code of them, and not of a clamp that hands on NaN.
    total = torch.where(total < LAST, total, LAST)
    return torch.where(total > -LAST, total, -LAST)


def start(f: Tensor, scale: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """F of column 0 -> (stream, its value in F's dtype)."""
    total = quantize(f, scale)
    return bounded(total).to(torch.int32), (total * step).to(f.dtype)


def add(
    f: Tensor, stream: Tensor, magnitude: Tensor, sign: Tensor, scale: Tensor, step: Tensor
) -> Tensor:
    """``stream`` becomes quantize(F) + alpha * stream -> its value in F's dtype; what that loses is not kept."""
    total = quantize(f, scale) + sign * torch.floor(magnitude * stream.double() + 0.5)
    stream.copy_(bounded(total).to(torch.int32))
    return (total * step).to(f.dtype)


def encode(
    f: Tensor,
    stream: Tensor,
    magnitude: Tensor,
    sign: Tensor,
    scale: Tensor,
    step: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As ``add``, and what ``decode`` needs to undo it -> (value, remainder in ``dtype``)."""
    previous = stream.double()
    p = torch.floor(magnitude * previous + 0.5)
    remainder = (previous - torch.ceil((p - 0.5) / magnitude)).to(dtype)
    total = quantize(f, scale) + sign * p
    stream.copy_(bounded(total).to(torch.int32))
    return (total * step).to(f.dtype), remainder


def check(f: Tensor, stream: Tensor, scale: Tensor) -> Tensor:
    """Where column 0's stream is not quantize(F) (bool)."""
    return stream.double() != bounded(quantize(f, scale))


def decode(
    f: Tensor,
    stream: Tensor,
    remainder: Tensor,
    magnitude: Tensor,
    sign: Tensor,
    gradient: Tensor,
    scale: Tensor,
    step: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``stream`` becomes the previous column's -> (its value, its share of ``gradient``, where it cannot be right: bool).
    Where |alpha| > 1 not every p occurs, so a wrong one may round to a right stream: it is found here."""
    p = sign * (stream.double() - quantize(f, scale))
    exact = torch.ceil((p - 0.5) / magnitude) + remainder
    wrong = torch.floor(magnitude * exact + 0.5) != p
    previous = bounded(exact)
    stream.copy_(previous.to(torch.int32))
    return (previous * step).to(f.dtype), gradient * (magnitude * sign).to(gradient.dtype), wrong


def pack(remainder: Tensor, width: int) -> Tensor:
    """Non-negative integers of ``width`` bits -> the smallest tensor that holds them (uint8; int16 for 16 bits)."""
    if width == 0:
        return remainder.new_empty(0, dtype=torch.uint8)
    if width == 16:
        return remainder.to(torch.int16).flatten()
    per_byte = 8 // width
    flat = remainder.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % per_byte)).view(
        per_byte, -1
    )  # contiguous rows, not strides
    packed = flat[0].clone()
    for i in range(1, per_byte):
        packed |= flat[i] << (i * width)
    return packed


def unpack(packed: Tensor, width: int, shape: torch.Size) -> Tensor:
    """Inverse of ``pack``: uint8 (int16 for 16 bits) of ``shape``, or a single 0 for no bits at all."""
    if width == 0:
        return torch.zeros((), dtype=torch.uint8, device=packed.device)
    if width >= 8:
        return packed.view(shape)
    mask = (1 << width) - 1
    parts = torch.cat([(packed >> (i * width)) & mask for i in range(8 // width)])
    return parts[: shape.numel()].view(shape)
