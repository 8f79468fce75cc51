"""The files of a synthetic source as bytes: images, and corrupt files as real sources have them.

A file's bytes depend on its settings alone, so that any process can write any file, in any order
and again.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from pipeline.data.decode import Image
from pipeline.data.hashing import key_of
from pipeline.synthetic.drawing import draw_image

CORRUPT_KINDS = (
    "truncated",  # the second half of a JPEG is missing
    "empty",
    "text",  # a web page in place of an image
    "duplicate",  # the bytes of another image of the class
    "validation_duplicate",  # the bytes of a validation image
    "png",  # named like a JPEG, as are the next six
    "cmyk",
    "grey",
    "deep",  # PNG with 16 bits per channel
    "gzip",
    "small",  # below the dataset's min_side
    "stray",  # left in folders by operating systems
)
_WEB_PAGE = (
    b"<html><head><title>404 Not Found</title></head>"
    b"<body>This photo is no longer available.</body></html>\n"
)


@dataclass(frozen=True, kw_only=True)
class SyntheticFile:
    """One tar or folder of a synthetic source: images of one split, then corrupt files.

    Images are numbered ``first``, ``first`` + 1, ...; image i is of class ``wnids[i]``.
    """

    path: Path  # a tar if it ends in .tar, else a folder
    outer: Path | None  # the archive that will contain this tar
    seed: int
    sizes: tuple[int, int]  # least and largest side (pixels)
    split: str
    name_format: str  # of the members' names, with {wnid} and {number}
    wnids: tuple[str, ...]
    first: int
    corrupt: tuple[str, ...] = ()  # kinds of corrupt files to add
    small_side: int = 1  # side of an image that is too small (pixels)
    validation_number: int = 0  # of the validation image that a duplicate copies


def members(file: SyntheticFile) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each member of a tar or folder, one in memory at a time."""
    for number, wnid in enumerate(file.wnids, file.first):
        yield file.name_format.format(wnid=wnid, number=number), _jpeg_of(file, wnid, number)
    for index, kind in enumerate(file.corrupt):
        wnid = file.wnids[0]
        number = file.first + len(file.wnids) + index
        name = file.name_format.format(wnid=wnid, number=number)
        if kind == "stray":
            # The first one of a folder is .DS_Store; macOS resource forks follow, whose names stay
            # unique.
            is_first = file.corrupt.index(kind) == index
            name = ".DS_Store" if is_first else f"._{name}"
        yield name, _corrupt_content(file, kind, wnid, number)


def _jpeg_of(file: SyntheticFile, wnid: str, number: int, split: str = "") -> bytes:
    split = split or file.split
    quality = 70 + key_of("quality", file.seed, wnid, split, number) % 27
    return _encode(draw_image(file.seed, wnid, split, number, file.sizes), quality)


def _corrupt_content(file: SyntheticFile, kind: str, wnid: str, number: int) -> bytes:
    """The content of a corrupt file.

    Its image is of the class and unlike all others, unless it is a duplicate.
    """
    match kind:
        case "empty":
            return b""
        case "text":
            return _WEB_PAGE
        case "stray":
            return b"\x00\x00\x00\x01Bud1" + bytes(56)  # how a .DS_Store begins
        case "duplicate":
            copied = key_of("duplicate", file.seed, wnid, number) % len(file.wnids)
            return _jpeg_of(file, wnid, file.first + copied)
        case "validation_duplicate":
            return _jpeg_of(file, wnid, file.validation_number, "val")
        case "truncated":
            whole = _jpeg_of(file, wnid, number)
            return whole[: len(whole) // 2]
        case "gzip":
            return gzip.compress(_jpeg_of(file, wnid, number), mtime=0)  # no time: same bytes
    image = draw_image(file.seed, wnid, file.split, number, file.sizes)
    return encode_unusual(image, kind, file.small_side)


def encode_unusual(image: Image, kind: str, small_side: int) -> bytes:
    """Encode an image as ``kind`` says: a sound image, but not an ordinary colour JPEG."""
    match kind:
        case "png":
            return cv2.imencode(".png", image[..., ::-1])[1].tobytes()
        case "deep":
            # 257 = 65535 / 255: full scale stays full scale.
            return cv2.imencode(".png", image[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
        case "grey":
            grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
            return _encode(np.asarray(grey, np.uint8), 90, "GRAY", "Gray")
        case "cmyk":
            # Adobe stores inks inverted, so red, green and blue are the values of the first three.
            no_black = np.full_like(image[..., 0], 255)
            return _encode(np.dstack([image, no_black]), 90, "CMYK", "444")
        case "small":
            return _encode(np.asarray(cv2.resize(image, (small_side, small_side)), np.uint8), 90)
    raise ValueError(f"unknown kind of corrupt file: {kind}")


def _encode(image: Image, quality: int, colours: str = "RGB", subsampling: str = "420") -> bytes:
    return bytes(simplejpeg.encode_jpeg(image, quality, colours, subsampling))
