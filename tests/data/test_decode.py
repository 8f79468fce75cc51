"""Partial and scaled decoding give the same pixels as full decoding."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from pipeline.data.decode import decode_jpeg, first_rows, jpeg_size

KINDS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": "4:4:4"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:2:0": {"subsampling": "4:2:0"},
    "progressive": {"progressive": True},
    "progressive 4:4:4": {"progressive": True, "subsampling": "4:4:4"},
    "restarts": {"restart_marker_rows": 1},
    "header": {"exif": b"Exif\0\0" + bytes(300), "comment": b"\xff\xc0 no frame"},
}


def encoded(kind: str, width: int, height: int, mode: str = "RGB") -> bytes:
    noise = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Pillow.fromarray(noise).convert(mode).save(out, "JPEG", quality=90, **KINDS[kind])
    return out.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 150),
    share=st.floats(0.01, 1.0),
    grey=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_the_first_rows_equal_those_of_the_whole_image(
    kind: str, width: int, height: int, share: float, grey: bool
) -> None:
    data = encoded(kind, width, height, "L" if grey else "RGB")
    rows = max(1, round(height * share))
    shortened, kept = first_rows(memoryview(data), height, rows)
    assert rows <= kept <= max(rows + 18, 16)
    assert kept <= height
    assert jpeg_size(shortened) == (kept, width)
    assert np.array_equal(decode_jpeg(shortened)[:rows], decode_jpeg(data)[:rows])


def test_scales_between_one_and_a_half_are_not_used() -> None:
    data = encoded("4:2:0", 160, 80)
    assert decode_jpeg(data, 41, 81).shape == (80, 160, 3)
    assert decode_jpeg(data, 40, 80).shape == (40, 80, 3)
    assert decode_jpeg(data, 21, 41).shape == (30, 60, 3)
    assert decode_jpeg(data, 1, 1).shape == (10, 20, 3)


def test_the_header_is_shortened_as_in_the_worked_example() -> None:
    data = encoded("4:2:0", 500, 375)
    frame = bytes.fromhex("ffc0 0011 08 0177 01f4")
    assert data.count(frame) == 1
    shortened, height = first_rows(memoryview(data), 375, 100)
    assert height == 112
    assert bytes(shortened) == data.replace(frame, bytes.fromhex("ffc0 0011 08 0070 01f4"))


def test_data_without_a_frame_header_is_not_changed() -> None:
    for data in (b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\0\x10 no more", b"\xff\xd8" + b"\xff" * 40):
        assert first_rows(memoryview(data), 100, 10) == (data, 100)
