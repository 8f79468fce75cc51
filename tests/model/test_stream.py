"""The fixed-point stream: every product with alpha can be undone to the last bit, in as many bits as promised."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model import stream

LIMIT = 2**31 - 1


@settings(max_examples=150, deadline=None)
@given(
    st.floats(-2, 2, width=32),
    st.lists(st.integers(-(2**29), 2**29), min_size=1, max_size=50),
    st.floats(-1000, 1000, width=32),
)
def test_decode_inverts_encode(alpha: float, values: list[int], f: float) -> None:
    a, previous = torch.tensor([alpha]), torch.tensor(values, dtype=torch.int32).view(-1, 1)
    branch = torch.full_like(previous, 1).float() * f
    current, remainder = stream.encode(branch, previous, a)
    magnitude = float(stream.split_alpha(a)[0])
    width = stream.remainder_width(magnitude)
    assert int(remainder.min()) >= 0 and int(remainder.max()) < math.ceil(1 / magnitude)
    packed = stream.pack(remainder, width)
    assert packed.numel() * packed.element_size() * 8 <= remainder.numel() * width + 16
    again = stream.unpack(packed, width, remainder.shape)
    assert torch.equal(stream.decode(branch, current, again, a), previous)


def test_widths_of_the_documented_ranges() -> None:
    expected = {1.5: 0, 1.0: 0, 0.5: 1, 0.49: 2, 0.25: 2, 0.2: 4, 1 / 16: 4, 0.06: 8, 1 / 256: 8, 1e-3: 16}
    assert {a: stream.remainder_width(a) for a in expected} == expected


def test_the_sign_of_zero_is_plus_and_the_limit_holds() -> None:
    magnitude, sign = stream.split_alpha(torch.tensor([0.0, -0.0, 1e-9, -1e-9, -1.0]))
    assert sign.tolist() == [1, 1, 1, -1, -1]
    assert float(magnitude.min()) >= stream.ALPHA_LIMIT
