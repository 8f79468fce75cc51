"""Encoded bytes -> RGB pixels, decoding no more of them than needed.

Decoding is the most expensive part of the data path. Two properties of JPEG reduce it: the decoder
can produce the image at 1/2, 3/8, 1/4 or 1/8 of its size directly, and it stops early if the header
claims fewer rows.
"""

from __future__ import annotations

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # (height, width, 3), RGB

JPEG_MAGIC = b"\xff\xd8\xff"
_ANY_FORMAT = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
# Height of the largest usual coding unit: 4:2:0 codes colour in blocks of 16 x 16 pixels. A height
# that is a multiple of it ends between two units.
_UNIT_ROWS = 16
# The decoder interpolates a pixel's colour from up to two rows below it, which must be decoded too.
_CONTEXT_ROWS = 2


def jpeg_header(data: bytes | memoryview) -> tuple[int, int, str]:
    """(height, width, colour space) of a JPEG from its header; sizes in pixels.

    Raises:
        ValueError: if the header cannot be read.
    """
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except KeyError:  # from simplejpeg's table of colour spaces
        raise ValueError("the JPEG header has an unknown colour space") from None
    return height, width, space


def jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    """(height, width) of a JPEG from its header, in pixels.

    Raises:
        ValueError: if the header cannot be read.
    """
    return jpeg_header(data)[:2]


def first_rows(data: memoryview, height: int, rows: int) -> tuple[memoryview, int]:
    """Shorten a JPEG so that decoding stops soon after its first ``rows`` rows.

    A JPEG is a stream without an index: the decoder reads every bit of every row, whichever part of
    the image is needed. A smaller height in the frame header (ITU T.81, B.2.2) makes it stop early.
    It skips the rest of the data as unknown. The first ``rows`` rows keep their pixels.

    Worked example: an image of 500 x 375 pixels, of which 100 rows are needed.

        FF D8  FF E0 00 10 ...  FF DB 00 43 ...  FF C0 00 11 08 01 77 01 F4 03 ...
        start  APP0, 16 bytes   tables           frame header:
                                                 length 17, 8 bits, height 0x0177 = 375, width 500

    100 + 2 rows are rounded up to 112 = 0x0070, and the two bytes of the height become 00 70.

    Args:
        height: of the image (pixels).
    Returns:
        The JPEG, and its height now; both unchanged where shortening is impossible or saves
        nothing.
    """
    kept_rows = -(-(rows + _CONTEXT_ROWS) // _UNIT_ROWS) * _UNIT_ROWS
    if kept_rows >= height or (offset := _height_offset(data)) is None:
        return data, height
    shortened = bytearray(data)
    shortened[offset : offset + 2] = kept_rows.to_bytes(2, "big")
    return memoryview(shortened), kept_rows


def _height_offset(data: memoryview) -> int | None:
    """Offset of the height (two bytes) in the frame header; None if there is no such header."""
    # Segments follow the two bytes of the start marker. Each is FF, a marker byte, and a length of
    # two bytes that counts itself but not the marker.
    offset = 2
    while offset + 9 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        # C0 .. CF start a frame, except C4 (Huffman tables), C8 (reserved) and CC (arithmetic
        # coding tables). The height follows marker (2), length (2) and precision (1).
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return offset + 5
        if marker == 0xFF:  # a fill byte before the marker
            offset += 1
        else:
            offset += 2 + (data[offset + 2] << 8 | data[offset + 3])
    return None


def decode_jpeg(data: bytes | memoryview, min_height: int = 0, min_width: int = 0) -> Image:
    """Decode a JPEG at the smallest scale that is at least ``min_height`` x ``min_width`` pixels.

    The scales are 1, 1/2, 3/8, 1/4 and 1/8. Those between 1 and 1/2 are left out because they are
    slower than 1. Damage that the decoder can tolerate is ignored: the preparation has rejected bad
    images already.

    Raises:
        ValueError: if the data is not a JPEG, or too damaged to decode.
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
    """Decode any format that OpenCV reads, including CMYK, grey, 16-bit and alpha, to RGB.

    The EXIF orientation is ignored, as the published ImageNet recipes do.

    Raises:
        ValueError: if the data cannot be decoded.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _ANY_FORMAT) if len(data) else None
    except cv2.error as error:
        raise ValueError(str(error).strip()) from error
    if image is None:
        raise ValueError("unknown image format")
    return np.asarray(image, dtype=np.uint8)
