"""Fixed-point stream: decode inverts encode to the last bit, in the documented number of bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model import fixed_point
from pipeline.model.fixed_point import GridAlpha

MAX_INTEGER = 2**31 - 1
RESOLUTION = fixed_point.make_resolution(18, torch.device("cpu"))


@settings(max_examples=150, deadline=None)
@given(
    st.floats(-2, 2, width=32),
    st.lists(st.integers(-(2**29), 2**29), min_size=1, max_size=50),
    st.floats(-1000, 1000, width=32),
)
def test_decode_inverts_encode(alpha: float, integers: list[int], f: float) -> None:
    previous = torch.tensor(integers, dtype=torch.int32).view(-1, 1)
    stream = previous.clone()
    branch = torch.full((len(integers), 1), f)
    grid_alpha = fixed_point.grid_alpha(torch.tensor([alpha]))
    magnitude = float(grid_alpha.magnitude)
    width = fixed_point.remainder_width(magnitude)

    dtype = fixed_point.remainder_dtype(width)
    value, remainder = fixed_point.encode(branch, stream, grid_alpha, RESOLUTION, dtype)
    assert torch.equal(value, (stream.double() / 2**18).float())
    assert int(remainder.min()) >= 0
    assert int(remainder.max()) < math.ceil(1 / magnitude)

    packed = fixed_point.pack(remainder, width)
    assert packed.numel() * packed.element_size() * 8 <= remainder.numel() * width + 16
    gradient = torch.randn(len(integers), 1)
    value, shortcut_gradient, mismatch = fixed_point.decode(
        branch,
        stream,
        remainder=fixed_point.unpack(packed, width, remainder.shape),
        gradient=gradient,
        alpha=grid_alpha,
        resolution=RESOLUTION,
    )
    assert torch.equal(stream, previous)
    assert torch.equal(value, (previous.double() / 2**18).float())
    assert not mismatch.any()
    assert fixed_point.checksum(stream) == fixed_point.checksum(previous)
    signed_alpha = (grid_alpha.magnitude * grid_alpha.sign).float()
    assert torch.equal(shortcut_gradient, gradient * signed_alpha)


def test_the_worked_example_of_the_documentation() -> None:
    stream = torch.tensor([[7], [8], [9]], dtype=torch.int32)
    f = torch.full((3, 1), 10 / 2**18)
    half = fixed_point.grid_alpha(torch.tensor([0.5]))
    _, remainder = fixed_point.encode(f, stream, half, RESOLUTION, torch.uint8)
    assert stream.flatten().tolist() == [14, 14, 15]
    assert remainder.flatten().tolist() == [0, 1, 0]


def test_decode_reports_a_stream_that_no_column_can_have_produced() -> None:
    twice = GridAlpha(magnitude=torch.tensor([2.0]).double(), sign=torch.tensor([1.0]).double())
    stream = torch.tensor([[5], [6]], dtype=torch.int32)  # 2 * c_prev is even
    zero = torch.zeros(2, 1)
    remainder = torch.zeros((), dtype=torch.uint8)
    _, _, mismatch = fixed_point.decode(
        zero, stream, remainder=remainder, gradient=zero, alpha=twice, resolution=RESOLUTION
    )
    assert mismatch.flatten().tolist() == [True, False]
    assert stream.flatten().tolist() == [3, 3]


def test_the_stream_saturates_at_the_ends_of_its_range() -> None:
    f = torch.tensor([[9000.0], [-9000.0], [1.0]])
    stream, _ = fixed_point.start(f, RESOLUTION)
    assert stream.flatten().tolist() == [MAX_INTEGER, -MAX_INTEGER, 2**18]
    value = fixed_point.add(f, stream, fixed_point.grid_alpha(torch.tensor([1.0])), RESOLUTION)
    assert stream.flatten().tolist() == [MAX_INTEGER, -MAX_INTEGER, 2**19]
    assert value.flatten().tolist() == [17192, -17192, 2]
    assert fixed_point.start(torch.tensor([[torch.nan]]), RESOLUTION)[0].item() == MAX_INTEGER


def test_every_flipped_bit_changes_the_checksum() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.float64):
        # Odd sizes, offsets and strides.
        tensor = torch.randn(8, 3).to(dtype)[1:, : 2 + (dtype != torch.uint8)]
        before = fixed_point.checksum(tensor)
        raw = tensor.view(torch.uint8)
        for row, byte in itertools.product(range(7), range(raw.shape[1])):
            raw[row, byte] ^= 1 << ((row + byte) % 8)
            assert fixed_point.checksum(tensor) != before
            raw[row, byte] ^= 1 << ((row + byte) % 8)


@pytest.mark.parametrize(
    ("smallest", "width"),
    [
        (1.5, 0),
        (1.0, 0),
        (0.5, 1),
        (0.49, 2),
        (0.25, 2),
        (0.2, 4),
        (1 / 16, 4),
        (0.06, 8),
        (1 / 256, 8),
        (1e-3, 16),
    ],
)
def test_remainder_widths_of_the_documented_ranges(smallest: float, width: int) -> None:
    assert fixed_point.remainder_width(smallest) == width


def test_zero_has_a_positive_sign_and_magnitudes_respect_the_limit() -> None:
    magnitude, sign = fixed_point.grid_alpha(torch.tensor([0.0, -0.0, 1e-9, -1e-9, -1.0]))
    assert sign.tolist() == [1, 1, 1, -1, -1]
    assert float(magnitude.min()) >= fixed_point.ALPHA_LIMIT
