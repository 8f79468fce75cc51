"""Clean one image file: keep it as it is, convert it to JPEG, or reject it with a reason.

    photo.JPEG                 kept, byte for byte
    photo.JPEG without end     kept: only the end marker is missing, all pixels are there
    photo.JPEG, cut            rejected: truncated
    photo.JPEG that is a PNG   converted to JPEG (also GIF, TIFF, WebP, CMYK, 16 bit, alpha)
    photo.JPEG, gzipped        unpacked, then treated as above
    photo.JPEG, taken upright  rotated, with exif_orientation: apply
    404 page named .JPEG       rejected: not_an_image
    photo.txt, .DS_Store       left out: no image, and does not look like one
    30,000 x 30,000 pixels     rejected: too_many_pixels, from the header alone
    40 x 66,000 pixels, a PNG  rejected: too_long, no JPEG has so long a side
    8 x 8 pixels               rejected: too_small

Rejections are strict, because a decoder that paints half of an image grey would train the model on
grey. An image of more than ``max_pixels`` is never decoded, so that a small file cannot exhaust the
memory. ``data/image_files`` has the rules of pixels.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from pipeline.config.schema import DatasetConfig
from pipeline.data.decode import Image
from pipeline.data.image_files import ImageHeader, UnusableImage, decode_file, read_header
from pipeline.sources.image_kinds import HEAD_BYTES, image_kind
from pipeline.sources.member import LEFT_OUT, MAX_BYTES, Rejection
from pipeline.sources.names import is_litter, may_be_image

_GZIP_MAGIC = b"\x1f\x8b"
_LFS_POINTER = b"version https://git-lfs"
_LONGEST_SIDE = 65_500  # pixels, of libjpeg
CHANGES = ("", "converted", "resized", "unpacked", "rotated")
_MOMENTS_GRID = 32  # about so many rows and columns of pixels are sampled for mean and std


@dataclass(frozen=True, kw_only=True)
class CleanImage:
    """An image fit for a shard.

    ``changed``: one of CHANGES; empty if the bytes are those of the source. ``source_size``: width
    and height in pixels before resizing.
    ``moments``: mean of red, green and blue over a sample of the pixels, then mean of their
    squares, in [0, 1].
    """

    data: bytes
    width: int
    height: int
    changed: str
    moments: tuple[float, ...]
    source_size: tuple[int, int]


def clean(data: bytes, name: str, config: DatasetConfig) -> CleanImage | Rejection:
    """Clean one file.

    ``name``: path of the file. The content decides whether it is an image; of a file that is none,
    the name decides whether it was meant to be one.
    """
    if is_litter(name):
        return Rejection(LEFT_OUT, "no image: a system file or a note")
    unpacked = _gunzip(data) if data.startswith(_GZIP_MAGIC) else data
    if not may_be_image(name) and not (unpacked and image_kind(unpacked[:HEAD_BYTES])):
        return Rejection(LEFT_OUT, "no image, by its content and its ending")
    if unpacked is None:
        return Rejection("damaged_gzip", "does not unpack, or to more than 256 MiB")
    if not unpacked:
        return Rejection("empty", "no bytes")
    if unpacked.startswith(_LFS_POINTER):
        return Rejection("not_an_image", "a pointer of Git LFS: run `git lfs pull` in the source")
    try:
        return _clean_image(unpacked, config, is_unpacked=unpacked is not data)
    except MemoryError:
        raise  # says nothing about the file
    except Exception as error:  # whatever a decoder or the encoder meets, it is about this file
        return Rejection("undecodable", f"{type(error).__name__}: {error}")


def _gunzip(data: bytes) -> bytes | None:
    """Unpacked bytes; None if the data is damaged or unpacks to more than MAX_BYTES (a bomb)."""
    unpacker = zlib.decompressobj(wbits=31)  # 31: the gzip format
    try:
        unpacked = unpacker.decompress(data, MAX_BYTES)
    except zlib.error:
        return None
    return None if unpacker.unconsumed_tail or not unpacker.eof else unpacked


def _clean_image(
    data: bytes, config: DatasetConfig, *, is_unpacked: bool
) -> CleanImage | Rejection:
    try:
        header = read_header(data, orientation=config.exif_orientation == "apply")
    except UnusableImage as error:
        return Rejection(error.reason, error.detail)
    rejection = reject_size(header.width, header.height, config)
    if rejection is not None:
        return rejection
    try:
        # Decode even what is kept as it is: only decoding shows damage.
        pixels = decode_file(data, header)
    except UnusableImage as error:
        return Rejection(error.reason, error.detail, size=(header.width, header.height))
    change = _change(header, config)
    if change:
        return _encode(pixels, config, change)
    return CleanImage(
        data=data,
        width=header.width,
        height=header.height,
        changed="unpacked" if is_unpacked else "",
        moments=_moments(pixels),
        source_size=(header.width, header.height),
    )


def _change(header: ImageHeader, config: DatasetConfig) -> str:
    """Why an image is encoded again; '' if its bytes are kept."""
    if header.kind != "JPEG" or header.is_cmyk:
        return "converted"
    if header.orientation != 1:
        return "rotated"
    side = min(header.width, header.height)
    return "resized" if config.short_side != "keep" and side > config.short_side else ""


def reject_size(width: int, height: int, config: DatasetConfig) -> Rejection | None:
    """The rejection of an image for its size; None if it is within the limits."""
    size = (width, height)
    if width * height > config.max_pixels:
        detail = f"{width} x {height} pixels, at most {config.max_pixels} in all"
        return Rejection("too_many_pixels", detail, size)
    if min(width, height) < config.min_side:
        detail = f"{width} x {height} pixels, the shorter side at least {config.min_side}"
        return Rejection("too_small", detail, size)
    return None


def _encode(image: Image, config: DatasetConfig, changed: str) -> CleanImage | Rejection:
    """Scale down to ``short_side`` (never up) and encode as JPEG."""
    height, width = image.shape[:2]
    source_size = (width, height)
    if config.short_side != "keep" and min(height, width) > config.short_side:
        scale = config.short_side / min(height, width)
        width = max(1, round(width * scale))
        height = max(1, round(height * scale))
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        image = np.asarray(resized, dtype=np.uint8)
    if max(width, height) > _LONGEST_SIDE:
        detail = f"{width} x {height} pixels, a side of a JPEG at most {_LONGEST_SIDE}"
        return Rejection("too_long", detail, source_size)
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=config.jpeg_quality, colorspace="RGB"
    )
    return CleanImage(
        data=bytes(data),
        width=width,
        height=height,
        changed=changed,
        moments=_moments(image),
        source_size=source_size,
    )


def _moments(image: Image) -> tuple[float, ...]:
    """Mean and mean square of each channel, over about 32 x 32 evenly spaced pixels."""
    row_step = max(1, image.shape[0] // _MOMENTS_GRID)
    column_step = max(1, image.shape[1] // _MOMENTS_GRID)
    sample = np.ascontiguousarray(image[::row_step, ::column_step])
    means, deviations = cv2.meanStdDev(sample)
    mean = means[:, 0] / 255
    deviation = deviations[:, 0] / 255
    # Mean squares, not deviations: they can be summed over images. E[x^2] = mean^2 + deviation^2.
    return (*mean.tolist(), *(mean**2 + deviation**2).tolist())
