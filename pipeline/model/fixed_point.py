"""Arithmetic of the fixed-point stream: exact sums, and a product with alpha that can be undone.

The stream holds the maps c[t][l] of one column as int32 multiples of 2**-fraction_bits. With the
default of 18 bits the resolution is 3.8e-6, the range +-8192. Adding F is a sum of integers, so
subtracting F gives back exactly the same integer. Multiplying by alpha loses information where
|alpha| < 1; the lost bits are kept as a *remainder*. With a = |alpha|, rounded to a multiple of
2**-18, everything in float64:

    encode   p = floor(a * c_prev + 1/2)           is added, with alpha's sign, to quantize(F)
             r = c_prev - ceil((p - 1/2) / a)      0 <= r < ceil(1/a): the remainder
    decode   c_prev = ceil((p - 1/2) / a) + r

All integers that round to one p form an interval. It begins at ceil((p - 1/2) / a) and has at most
ceil(1/a) members, and r is the position of c_prev in it. So r takes log2(ceil(1/a)) bits, rounded
up: none for a >= 1, one at the initial a = 0.5, two for a = 0.3.

Worked example with a = 0.5 and sign +1. The integers 7 and 8 share p = 4, and r tells them apart:

    c_prev   a * c_prev + 1/2   p   ceil((p - 1/2) / a)   r
       7           4.0          4     ceil(7.0) = 7       0
       8           4.5          4     ceil(7.0) = 7       1
       9           5.0          5     ceil(9.0) = 9       0

    encode   c_prev = 8, quantize(F) = 10:   c = 10 + 4 = 14, r = 1
    decode   c = 14, quantize(F) = 10:       p = 14 - 10 = 4, c_prev = 7 + 1 = 8

Why float64 and the 2**-18 grid: c has 31 bits and a has 19, so the product a * c fits the 53 bits
of a float64 exactly, and the quotient is precise to the last integer. Every product and quotient
here is exact or rounded once, so eager and compiled code give the same bits.

``start``, ``add``, ``encode``, ``check_start`` and ``decode`` are element-wise kernels (see
``stream_kernels``). They take a map as (positions, channels) and update the stream in place. They
saturate instead of wrapping; the float value that they return is not clamped, so its magnitude
shows the overflow. Sums and extremes are taken outside the kernels: a reduction in the same loop
would keep compilers from vectorising it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ALPHA_SCALE = float(1 << 18)  # grid points of |alpha| per 1.0
ALPHA_LIMIT = 1e-3  # smallest |alpha| that training allows
REMAINDER_WIDTHS = (0, 1, 2, 4, 8, 16)  # bits; those that pack into bytes without gaps
MAX_INTEGER = float(2**31 - 1)  # of the stream


class Resolution(NamedTuple):
    """Resolution of the stream, as float64 scalars on its device."""

    scale: Tensor  # integers per 1.0: 2**fraction_bits
    step: Tensor  # value of one integer: 2**-fraction_bits


class GridAlpha(NamedTuple):
    """alpha on its grid, (C,) float64 each."""

    magnitude: Tensor  # a multiple of 2**-18, at least ALPHA_LIMIT
    sign: Tensor  # -1 or +1; +1 where alpha is 0


def make_resolution(fraction_bits: int, device: torch.device) -> Resolution:
    """Make the scalars directly on the device: a copy from the host could synchronise."""
    return Resolution(
        scale=torch.full((), 2.0**fraction_bits, dtype=torch.float64, device=device),
        step=torch.full((), 2.0**-fraction_bits, dtype=torch.float64, device=device),
    )


def grid_alpha(alpha: Tensor) -> GridAlpha:
    """Round |alpha| (C,) to the grid and split off its sign."""
    a = alpha.detach().double()
    # Rounding must not go below the limit: the remainder widths are bounded by it.
    steps = torch.floor(a.abs() * ALPHA_SCALE + 0.5).clamp(min=math.ceil(ALPHA_LIMIT * ALPHA_SCALE))
    return GridAlpha(steps / ALPHA_SCALE, torch.where(a < 0, -1.0, 1.0).to(a.dtype))


def remainder_width(smallest: float) -> int:
    """Return the bits per remainder if the smallest |alpha| is ``smallest``.

    Example: 0.3 -> ceil(1 / 0.3) = 4 possible remainders -> 2 bits. 0.2 -> 5 remainders -> 4 bits,
    because 3 bits do not pack into bytes.
    """
    remainders = math.ceil(1.0 / max(smallest, ALPHA_LIMIT / 2))
    return next(width for width in REMAINDER_WIDTHS if remainders <= 1 << width)


def remainder_dtype(width: int) -> torch.dtype:
    """Return the dtype of remainders of ``width`` bits before they are packed."""
    return torch.int16 if width > 8 else torch.uint8


def quantize(f: Tensor, scale: Tensor) -> Tensor:
    """Round to the nearest integer of the stream. The result is a whole float64."""
    return torch.floor(f.double() * scale + 0.5)


def checksum(tensor: Tensor) -> Tensor:
    """Sum a tensor's bits, read as integers, into an int32 that wraps around.

    Any single flipped bit changes the sum: it adds or subtracts 2**k, which is not 0 modulo 2**32.
    """
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    # Read the widest integers that the number of bytes and the alignment allow.
    offset = flat.storage_offset()
    size = next(size for size in (4, 2, 1) if flat.numel() % size == 0 and offset % size == 0)
    return flat.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[size]).sum(dtype=torch.int32)


def saturate(total: Tensor) -> Tensor:
    """Limit whole float64 numbers to the stream's range. NaN becomes the upper end."""
    # Comparisons are false for NaN, so it takes the second value. Compilers vectorise them, but not
    # a clamp, which must propagate NaN.
    total = torch.where(total < MAX_INTEGER, total, MAX_INTEGER)
    return torch.where(total > -MAX_INTEGER, total, -MAX_INTEGER)


def start(f: Tensor, resolution: Resolution) -> tuple[Tensor, Tensor]:
    """Start the stream from F of column 0 -> (stream, its value in F's dtype)."""
    total = quantize(f, resolution.scale)
    return saturate(total).to(torch.int32), (total * resolution.step).to(f.dtype)


def add(f: Tensor, stream: Tensor, alpha: GridAlpha, resolution: Resolution) -> Tensor:
    """Set ``stream`` to quantize(F) + alpha * stream and return its value in F's dtype.

    For columns that are not inverted: the remainder is discarded.
    """
    p = torch.floor(alpha.magnitude * stream.double() + 0.5)
    total = quantize(f, resolution.scale) + alpha.sign * p
    stream.copy_(saturate(total).to(torch.int32))
    return (total * resolution.step).to(f.dtype)


def encode(
    f: Tensor, stream: Tensor, alpha: GridAlpha, resolution: Resolution, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Do the same as ``add``, and return also the remainder -> (value, remainder in ``dtype``)."""
    previous = stream.double()
    p = torch.floor(alpha.magnitude * previous + 0.5)
    remainder = (previous - torch.ceil((p - 0.5) / alpha.magnitude)).to(dtype)
    total = quantize(f, resolution.scale) + alpha.sign * p
    stream.copy_(saturate(total).to(torch.int32))
    return (total * resolution.step).to(f.dtype), remainder


def check_start(f: Tensor, stream: Tensor, resolution: Resolution) -> Tensor:
    """Return where column 0's stream differs from quantize(F) (bool)."""
    return stream.double() != saturate(quantize(f, resolution.scale))


def decode(
    f: Tensor,
    stream: Tensor,
    *,
    remainder: Tensor,
    gradient: Tensor,
    alpha: GridAlpha,
    resolution: Resolution,
) -> tuple[Tensor, Tensor, Tensor]:
    """Undo ``encode``: set ``stream`` to the previous column's.

    The previous map's part of ``gradient`` (the gradient of this level's output) is computed in the
    same loop, because it needs the same alpha.

    Returns:
        value: the previous map in F's dtype.
        shortcut_gradient: alpha * ``gradient``.
        mismatch: where encoding the recovered c_prev does not give p again (bool), so that the
            stream or F must be wrong. Example: c_prev = 3 with a = 2 has p = 6. A wrong p = 5 still
            decodes to ceil(4.5 / 2) = 3, but 3 encodes to 6, not 5.
    """
    p = alpha.sign * (stream.double() - quantize(f, resolution.scale))
    exact = torch.ceil((p - 0.5) / alpha.magnitude) + remainder
    mismatch = torch.floor(alpha.magnitude * exact + 0.5) != p
    previous = saturate(exact)
    stream.copy_(previous.to(torch.int32))
    signed_alpha = (alpha.magnitude * alpha.sign).to(gradient.dtype)
    return (previous * resolution.step).to(f.dtype), gradient * signed_alpha, mismatch


def pack(remainder: Tensor, width: int) -> Tensor:
    """Pack non-negative integers of ``width`` bits -> 1-D uint8 (int16 for 16 bits).

    Example with width 4, two per byte: [1, 2, 3, 4] are the rows [1, 2] and [3, 4]. The first row
    takes the low bits and the second the high bits: [1 + 3 * 16, 2 + 4 * 16].
    """
    if width == 0:
        return remainder.new_empty(0, dtype=torch.uint8)
    if width == 16:
        return remainder.to(torch.int16).flatten()
    per_byte = 8 // width
    flat = remainder.flatten().to(torch.uint8)
    # Contiguous rows: packing strided views is much slower.
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % per_byte)).view(per_byte, -1)
    packed = rows[0].clone()
    for i in range(1, per_byte):
        packed |= rows[i] << (i * width)
    return packed


def unpack(packed: Tensor, width: int, shape: torch.Size) -> Tensor:
    """Undo ``pack``: uint8 (int16 for 16 bits) of ``shape``, or a scalar 0 if the width is 0."""
    if width == 0:
        return torch.zeros((), dtype=torch.uint8, device=packed.device)
    if width >= 8:
        return packed.view(shape)
    mask = (1 << width) - 1
    rows = torch.cat([(packed >> (i * width)) & mask for i in range(8 // width)])
    return rows[: shape.numel()].view(shape)
