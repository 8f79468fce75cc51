"""Encoded bytes -> RGB pixels, no more of them than needed."""

from __future__ import annotations

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # (height, width, 3), RGB

JPEG_MAGIC = b"\xff\xd8\xff"
_ANY = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_ROWS = 16  # of a JPEG's largest usual unit
_CONTEXT = 2  # rows below a pixel that its colour is interpolated from


def jpeg_header(data: bytes | memoryview) -> tuple[int, int, str]:
    """(height, width, colour space) of a JPEG from its header; sizes in pixels. Raises ValueError when it has none."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except KeyError:  # of simplejpeg's table of colour spaces
        raise ValueError("the header names no known colour space") from None
    return height, width, space


def jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    """(height, width) of a JPEG from its header, in pixels. Raises ValueError when it has none."""
    return jpeg_header(data)[:2]


def first_rows(data: memoryview, height: int, rows: int) -> tuple[memoryview, int]:
    """A JPEG whose decoding ends soon after its first ``rows`` rows, which stay what they are, and its height (pixels).

    Most of a decoder's time goes into reading every bit of every row: a lower height in the header (ITU T.81, B.2.2), and
    it stops there. What follows is skipped as unknown, which the decoder gets over.
    """
    kept = -(-(rows + _CONTEXT) // _ROWS) * _ROWS
    if kept >= height or (place := _height_at(data)) is None:
        return data, height
    shortened = bytearray(data)
    shortened[place : place + 2] = kept.to_bytes(2, "big")
    return memoryview(shortened), kept


def _height_at(data: memoryview) -> int | None:
    """Where the header of a JPEG's frame has its height: two bytes."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return place + 5
        place += 1 if marker == 0xFF else 2 + (data[place + 2] << 8 | data[place + 3])
    return None


def decode_jpeg(data: bytes | memoryview, min_height: int = 0, min_width: int = 0) -> Image:
    """Decode a JPEG, at the smallest of the scales 1, 1/2, 3/8, 1/4, 1/8 that is at least ``min_height`` x ``min_width``.

    The scales between 1 and 1/2 would be slower than 1. Damage that the decoder can get over is got over: the preparation
    has judged it already.

    Raises:
        ValueError: not a JPEG, or damaged beyond that.
    """
    image: Image = simplejpeg.decode_jpeg(
        data,
        "RGB",
        fastdct=True,
        min_height=min_height,
        min_width=min_width,
        min_factor=2,
        strict=False,
    )
    return image


def decode_any(data: bytes | memoryview) -> Image:
    """Decode any format that OpenCV knows, CMYK, grey, 16-bit and alpha included, to RGB; the EXIF orientation is ignored.

    Raises:
        ValueError: cannot be decoded.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _ANY) if len(data) else None
    except cv2.error as error:
        raise ValueError(str(error).strip()) from error
    if image is None:
        raise ValueError("no image format that is known")
    return np.asarray(image, dtype=np.uint8)
