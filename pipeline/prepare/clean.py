"""Clean one image file: keep it as it is, convert it to JPEG, or reject it with a reason.

    photo.JPEG                 kept, byte for byte
    photo.JPEG without end     kept: only the end marker is missing, all pixels are there
    photo.JPEG, cut            rejected: truncated
    photo.JPEG that is a PNG   converted to JPEG (also GIF, TIFF, WebP, CMYK, 16 bit, alpha)
    photo.JPEG, gzipped        unpacked, then treated as above
    404 page                   rejected: not_an_image
    30,000 x 30,000 pixels     rejected: too_many_pixels, from the header alone
    40 x 66,000 pixels, a PNG  rejected: too_long, no JPEG has so long a side
    8 x 8 pixels               rejected: too_small

Rejections are strict, because a decoder that paints half of an image grey would train the model on
grey. An image of more than ``max_pixels`` is never decoded, so that a small file cannot exhaust the
memory.
"""

from __future__ import annotations

import contextlib
import io
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np
import simplejpeg
from PIL import Image as Pillow

from pipeline.config.schema import DatasetConfig
from pipeline.data.decode import JPEG_MAGIC, Image, decode_any, decode_jpeg, jpeg_header
from pipeline.sources.member import MAX_BYTES, Rejection
from pipeline.sources.names import is_litter

_GZIP_MAGIC = b"\x1f\x8b"
_JPEG_END = b"\xff\xd9"
# Warnings of libjpeg after which all pixels are there.
_HARMLESS_WARNINGS = ("extraneous bytes", "Invalid SOS parameters", "Inconsistent progression")
# Formats that consist of pixels. Pillow opens others too, among them EPS: a program, which it would
# run (N5).
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "ICO")
_LONGEST_SIDE = 65_500  # pixels, of libjpeg
CHANGES = ("", "converted", "resized", "unpacked")
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

    ``name`` serves only to recognise files that operating systems leave behind.
    """
    base = name.rsplit("/", 1)[-1].lower()
    if is_litter(base):
        return Rejection("not_an_image", f"left by an operating system: {base}")
    unpacked = _gunzip(data) if data.startswith(_GZIP_MAGIC) else data
    if unpacked is None:
        return Rejection("damaged_gzip", "does not unpack, or to more than 256 MiB")
    if not unpacked:
        return Rejection("empty", "no bytes")
    if unpacked.startswith(JPEG_MAGIC):
        return _clean_jpeg(unpacked, config, changed="unpacked" if unpacked is not data else "")
    return _clean_other(unpacked, config)


def _gunzip(data: bytes) -> bytes | None:
    """Unpacked bytes; None if the data is damaged or unpacks to more than MAX_BYTES (a bomb)."""
    unpacker = zlib.decompressobj(wbits=31)  # 31: the gzip format
    try:
        unpacked = unpacker.decompress(data, MAX_BYTES)
    except zlib.error:
        return None
    return None if unpacker.unconsumed_tail or not unpacker.eof else unpacked


def _clean_jpeg(data: bytes, config: DatasetConfig, changed: str) -> CleanImage | Rejection:
    try:
        height, width, colour_space = jpeg_header(data)
    except ValueError as error:
        return Rejection("undecodable", str(error))
    rejection = reject_size(width, height, config)
    if rejection is not None:
        return rejection
    is_cmyk = colour_space in ("CMYK", "YCCK")
    # Decode even what is kept as it is: only decoding shows damage.
    pixels = _decode_with_pillow(data) if is_cmyk else _decode_strictly(data)
    if isinstance(pixels, Rejection):
        return replace(pixels, size=(width, height))
    if is_cmyk:
        return _encode(pixels, config, "converted")
    if config.short_side != "keep" and min(width, height) > config.short_side:
        return _encode(pixels, config, "resized")
    return CleanImage(
        data=data,
        width=width,
        height=height,
        changed=changed,
        moments=_moments(pixels),
        source_size=(width, height),
    )


def _decode_strictly(data: bytes) -> Image | Rejection:
    """All pixels, or what is wrong with the file."""
    try:
        image: Image = simplejpeg.decode_jpeg(data, "RGB", fastdct=True, strict=True)
        return image
    except ValueError as error:
        problem = str(error)
    if problem == "Premature end of JPEG file":
        # libjpeg says so both when pixels are missing and when only the end marker is. With a
        # marker appended, the second kind decodes without a warning.
        repaired = _decode_with_end(data)
        return repaired if repaired is not None else Rejection("truncated", problem)
    if any(warning in problem for warning in _HARMLESS_WARNINGS):
        try:
            return decode_jpeg(data)
        except ValueError as error:  # a second problem follows the harmless one
            return Rejection("corrupt", str(error))
    return Rejection("truncated" if "remature" in problem else "corrupt", problem)


def _decode_with_end(data: bytes) -> Image | None:
    try:
        image: Image = simplejpeg.decode_jpeg(data + _JPEG_END, "RGB", fastdct=True, strict=True)
    except ValueError:
        return None
    return image


def _clean_other(data: bytes, config: DatasetConfig) -> CleanImage | Rejection:
    """Convert PNG, GIF, BMP, TIFF, WebP and others to JPEG."""
    try:
        with _opened(data) as header:  # reads the header only
            width, height = header.size
    except _NotDecodable as error:
        return Rejection("not_an_image", str(error))
    rejection = reject_size(width, height, config)
    if rejection is not None:
        return rejection
    try:
        image = decode_any(data)
    except ValueError:
        # OpenCV knows fewer formats than Pillow, but decodes those that it knows faster.
        decoded = _decode_with_pillow(data)
        if isinstance(decoded, Rejection):
            return replace(decoded, size=(width, height))
        image = decoded
    return _encode(image, config, "converted")


class _NotDecodable(Exception):
    """Pillow cannot read a file."""


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Pillow.Image]:
    """Open a file and close it again. Raises _NotDecodable, also for an error of the body."""
    # Pillow has a limit of its own, which it looks up whenever it opens a file. Here the limit is
    # the job's ``max_pixels``, which may be larger.
    limit_of_pillow = Pillow.MAX_IMAGE_PIXELS
    Pillow.MAX_IMAGE_PIXELS = None
    try:
        # Pillow also warns, for example of odd EXIF data. What counts is whether it decodes.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Pillow.open(io.BytesIO(data), formats=_FORMATS) as image:
                yield image
    except MemoryError:
        raise  # says nothing about the file
    except Exception as error:
        # Damaged bytes make Pillow's many decoders raise whatever they happen to meet: a damaged
        # AVIF a RuntimeError, others an IndexError or a struct.error. One such file must not end
        # the preparation. The message is "cannot identify image file <_io.BytesIO ...>", for
        # example; the address is of no use.
        raise _NotDecodable(str(error).split(" <")[0]) from error
    finally:
        Pillow.MAX_IMAGE_PIXELS = limit_of_pillow


def _decode_with_pillow(data: bytes) -> Image | Rejection:
    try:
        with _opened(data) as image:
            return np.asarray(image.convert("RGB"), dtype=np.uint8)
    except _NotDecodable as error:
        return Rejection("undecodable", str(error))


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
