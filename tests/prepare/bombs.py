"""Decompression bombs: valid images of a few megabytes that decode to gigabytes."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import simplejpeg


def png_bomb(side: int) -> bytes:
    """A white PNG of side x side pixels, one bit each."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", *(side, side, 1, 0, 0, 0, 0))  # 1 bit, grey
    packer = zlib.compressobj(1)
    line = b"\0" + b"\xff" * -(-side // 8)  # filter type 0, then white pixels
    data = b"".join([*(packer.compress(line) for _ in range(side)), packer.flush()])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def jpeg_bomb(side: int) -> bytes:
    """A grey JPEG of side x side pixels (a multiple of 16).

    Every block is "same as the one before": six bits (001010) in the standard Huffman tables.
    """
    small = bytes(simplejpeg.encode_jpeg(np.full((8, 8, 1), 128, np.uint8), 90, "GRAY", "Gray"))
    frame = small.index(b"\xff\xc0")
    scan = small.index(b"\xff\xda")
    sized = small[: frame + 5] + struct.pack(">HH", side, side) + small[frame + 9 : scan]
    begin = scan + 2 + int.from_bytes(small[scan + 2 : scan + 4], "big")
    return (
        sized + small[scan:begin] + b"\x28\xa2\x8a" * (side // 8 * (side // 8) // 4) + b"\xff\xd9"
    )
