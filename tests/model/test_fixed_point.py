"""The fixed-point stream: every product with alpha can be undone to the last bit, in as many bits as promised."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
import torch._inductor
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model import fixed_point, stream_kernels

LIMIT = 2**31 - 1


UNITS = fixed_point.units_of(18, torch.device("cpu"))


@settings(max_examples=150, deadline=None)
@given(
    st.floats(-2, 2, width=32),
    st.lists(st.integers(-(2**29), 2**29), min_size=1, max_size=50),
    st.floats(-1000, 1000, width=32),
)
def test_decode_inverts_encode(alpha: float, values: list[int], f: float) -> None:
    previous = torch.tensor(values, dtype=torch.int32).view(-1, 1)
    moved, branch = previous.clone(), torch.full((len(values), 1), f)
    magnitude, sign = fixed_point.split_alpha(torch.tensor([alpha]))
    width = fixed_point.remainder_width(float(magnitude))
    value, remainder = fixed_point.encode(
        branch, moved, magnitude, sign, *UNITS, fixed_point.remainder_dtype(width)
    )
    assert torch.equal(value, (moved.double() / 2**18).float())
    assert int(remainder.min()) >= 0 and int(remainder.max()) < math.ceil(1 / float(magnitude))
    packed = fixed_point.pack(remainder, width)
    assert packed.numel() * packed.element_size() * 8 <= remainder.numel() * width + 16
    again = fixed_point.unpack(packed, width, remainder.shape)
    gradient = torch.randn(len(values), 1)
    value, share, wrong = fixed_point.decode(
        branch, moved, again, magnitude, sign, gradient, *UNITS
    )
    assert torch.equal(moved, previous) and torch.equal(value, (previous.double() / 2**18).float())
    assert not wrong.any() and fixed_point.fingerprint(moved) == fixed_point.fingerprint(previous)
    assert torch.equal(share, gradient * (magnitude * sign).float())


def test_the_stream_stays_at_the_end_of_its_range() -> None:
    f = torch.tensor([[9000.0], [-9000.0], [1.0]])
    current, _ = fixed_point.start(f, *UNITS)
    assert current.flatten().tolist() == [LIMIT, -LIMIT, 2**18]
    value = fixed_point.add(f, current, *fixed_point.split_alpha(torch.tensor([1.0])), *UNITS)
    assert current.flatten().tolist() == [LIMIT, -LIMIT, 2**19] and value.flatten().tolist() == [
        17192,
        -17192,
        2,
    ]
    assert fixed_point.start(torch.tensor([[torch.nan]]), *UNITS)[0].item() == LIMIT


def test_any_flipped_bit_changes_the_fingerprint() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.float64):
        kept = torch.randn(8, 3).to(dtype)[
            1:, : 2 + (dtype != torch.uint8)
        ]  # odd sizes, offsets, strides
        before = fixed_point.fingerprint(kept)
        raw = kept.view(torch.uint8)
        for row, byte in itertools.product(range(7), range(raw.shape[1])):
            raw[row, byte] ^= 1 << ((row + byte) % 8)
            assert fixed_point.fingerprint(kept) != before
            raw[row, byte] ^= 1 << ((row + byte) % 8)


@pytest.mark.slow
def test_compiled_passes_give_the_same_bits() -> None:
    if not stream_kernels._cpu_compiler():
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    for shape in ((1000, 24), (777, 7), (64, 130)):
        f, gradient = torch.randn(shape) * 50, torch.randn(shape)
        f.view(-1)[:6] = torch.tensor(
            [torch.nan, torch.inf, -torch.inf, 8191.9999, -8192.0, 1e30]
        )  # about the range's ends
        for low, high, remainder in (
            (-2.0, 2.0, torch.int16),
            (0.5, 1.0, torch.uint8),
            (1e-3, 1e-2, torch.int16),
        ):
            alpha = fixed_point.split_alpha(torch.empty(shape[1]).uniform_(low, high))
            start = (torch.randn(shape) * 2**24).to(torch.int32)
            results = []
            for one in (stream_kernels.EAGER, stream_kernels.compiled()):
                moved = start.clone()
                encoded = one.encode(f, moved, *alpha, *UNITS, remainder)
                forward = moved.clone()
                decoded = one.decode(f, moved, encoded[1], *alpha, gradient, *UNITS)
                added = start.clone()
                results.append(
                    [
                        *one.start(f, *UNITS),
                        one.add(f, added, *alpha, *UNITS),
                        added,
                        *encoded,
                        forward,
                        *decoded,
                        moved,
                        one.check(f, start, UNITS[0]),
                    ]
                )
            torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_flags_are_added_only_where_they_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    if sys.platform == "linux" and "cpp.march" in torch._inductor.list_options():
        monkeypatch.setenv("TORCHINDUCTOR_CPP_MARCH", "x86-64-v3")
        assert stream_kernels._options()["cpp.march"].startswith("x86-64-v3 -f")
    monkeypatch.setenv("CXX", "clang++")  # makes vector code by itself
    assert stream_kernels._options() == {"cpp.simdlen": 1}
    monkeypatch.delenv("CXX")
    monkeypatch.setattr("torch._inductor.list_options", lambda: ["cpp.simdlen"])  # an older PyTorch
    assert stream_kernels._options() == {"cpp.simdlen": 1}


def test_a_machine_without_a_compiler_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream_kernels._cpu_compiler.cache_clear()
    stream_kernels._say_slow.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    try:
        for _ in range(2):
            assert stream_kernels.choose("auto", torch.device("cpu"), 10**7) is stream_kernels.EAGER
        assert len(caplog.records) == 1 and "compiler" in caplog.text
        assert stream_kernels.choose("auto", torch.device("cpu"), 100) is stream_kernels.EAGER
    finally:
        stream_kernels._cpu_compiler.cache_clear()


def test_widths_of_the_documented_ranges() -> None:
    expected = {
        1.5: 0,
        1.0: 0,
        0.5: 1,
        0.49: 2,
        0.25: 2,
        0.2: 4,
        1 / 16: 4,
        0.06: 8,
        1 / 256: 8,
        1e-3: 16,
    }
    assert {a: fixed_point.remainder_width(a) for a in expected} == expected


def test_the_sign_of_zero_is_plus_and_the_limit_holds() -> None:
    magnitude, sign = fixed_point.split_alpha(torch.tensor([0.0, -0.0, 1e-9, -1e-9, -1.0]))
    assert sign.tolist() == [1, 1, 1, -1, -1]
    assert float(magnitude.min()) >= fixed_point.ALPHA_LIMIT
