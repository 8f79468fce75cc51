"""One image file: kept as it is, converted to JPEG, or rejected with a reason.

Never decodes more than ``max_pixels``: what has more is told by its header, at the cost of its bytes alone.
"""

from __future__ import annotations

import contextlib
import io
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from PIL import Image as Pillow

from pipeline.config.schema import DatasetConfig
from pipeline.data.decode import JPEG_MAGIC, Image, decode_any, decode_jpeg, jpeg_header
from pipeline.sources.reader import MAX_BYTES, Rejection

_GZIP = b"\x1f\x8b"
_HARMLESS = (
    "extraneous bytes",
    "Invalid SOS parameters",
    "Inconsistent progression",
)  # warnings of libjpeg: all pixels are there
# What Pillow may open: pictures made of pixels alone. It knows others too, EPS for one, which is a program that it runs.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "ICO")
_JUNK = (".ds_store", "thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Kept:
    """An image fit for a shard: its bytes and size (pixels), what was done to it ('' for nothing), and its mean and mean
    square over a sample of its pixels (RGB in [0, 1], three each)."""

    data: bytes
    width: int
    height: int
    changed: str
    moments: tuple[float, ...]


def clean(data: bytes, name: str, config: DatasetConfig) -> Kept | Rejection:
    """Judge one file. ``name`` only tells system litter from damaged images."""
    base = name.rsplit("/", 1)[-1].lower()
    if base in _JUNK or base.startswith("._"):
        return Rejection("not_an_image", f"left by an operating system: {base}")
    unpacked = _gunzip(data) if data[:2] == _GZIP else data
    if unpacked is None:
        return Rejection("damaged_gzip", "does not unpack, or to more than 256 MiB")
    if not unpacked:
        return Rejection("empty", "no bytes")
    changed = "unpacked" if unpacked is not data else ""
    if unpacked[:3] == JPEG_MAGIC:
        return _clean_jpeg(unpacked, config, changed)
    return _clean_other(unpacked, config)


def _gunzip(data: bytes) -> bytes | None:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        result = unpacker.decompress(data, MAX_BYTES)
    except zlib.error:
        return None
    return None if unpacker.unconsumed_tail or not unpacker.eof else result


def _clean_jpeg(data: bytes, config: DatasetConfig, changed: str) -> Kept | Rejection:
    try:
        height, width, space = jpeg_header(data)
    except ValueError as error:
        return Rejection("undecodable", str(error))
    if unfit := _unfit(width, height, config):
        return unfit
    if space in ("CMYK", "YCCK"):
        image = _pillow(data)
        return _encoded(image, config, "converted") if isinstance(image, np.ndarray) else image
    pixels = _decode_strictly(data)
    if isinstance(pixels, Rejection):
        return pixels
    if config.short_side != "keep" and min(width, height) > config.short_side:
        return _encoded(pixels, config, "resized")
    return Kept(data, width, height, changed, _moments(pixels))


def _decode_strictly(data: bytes) -> Image | Rejection:
    """All pixels, or what is wrong. A missing end marker alone is no damage."""
    try:
        image: Image = simplejpeg.decode_jpeg(data, "RGB", fastdct=True, strict=True)
        return image
    except ValueError as error:
        problem = str(error)
    if problem == "Premature end of JPEG file":
        if isinstance(whole := _decode_with_end(data), np.ndarray):
            return whole
        return Rejection("truncated", problem)
    if any(part in problem for part in _HARMLESS):
        try:
            return decode_jpeg(data)
        except ValueError as error:  # the first that it met was harmless, what follows is not
            return Rejection("corrupt", str(error))
    return Rejection("truncated" if "remature" in problem else "corrupt", problem)


def _decode_with_end(data: bytes) -> Image | None:
    try:
        image: Image = simplejpeg.decode_jpeg(data + b"\xff\xd9", "RGB", fastdct=True, strict=True)
    except ValueError:
        return None
    return image


def _clean_other(data: bytes, config: DatasetConfig) -> Kept | Rejection:
    """PNG, GIF, BMP, TIFF, WebP ...: decoded and made a JPEG."""
    try:
        with _opened(data) as header:  # reads the header only
            width, height = header.size
    except Pillow.DecompressionBombError as error:
        return Rejection("too_many_pixels", str(error))
    except (OSError, ValueError, SyntaxError) as error:
        return Rejection("not_an_image", str(error).split(" <")[0])
    if unfit := _unfit(width, height, config):
        return unfit
    try:
        image = decode_any(data)
    except ValueError:
        other = _pillow(data)
        if isinstance(other, Rejection):
            return other
        image = other
    return _encoded(image, config, "converted")


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Pillow.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Pillow warns of large images too: the limit here is the job's
        with Pillow.open(io.BytesIO(data), formats=_FORMATS) as image:
            yield image


def _pillow(data: bytes) -> Image | Rejection:
    try:
        with _opened(data) as image:
            return np.asarray(image.convert("RGB"), dtype=np.uint8)
    except (OSError, ValueError, SyntaxError) as error:
        return Rejection("undecodable", str(error).split(" <")[0])


def _unfit(width: int, height: int, config: DatasetConfig) -> Rejection | None:
    if width * height > config.max_pixels:
        return Rejection(
            "too_many_pixels", f"{width} x {height} pixels, at most {config.max_pixels} in all"
        )
    if min(width, height) < config.min_side:
        return Rejection(
            "too_small", f"{width} x {height} pixels, the shorter side at least {config.min_side}"
        )
    return None


def _encoded(image: Image, config: DatasetConfig, changed: str) -> Kept:
    """Scaled down to ``short_side`` (never up) and encoded as JPEG."""
    height, width = image.shape[:2]
    if config.short_side != "keep" and min(height, width) > config.short_side:
        scale = config.short_side / min(height, width)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        image = np.asarray(
            cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8
        )
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=config.jpeg_quality, colorspace="RGB"
    )
    return Kept(bytes(data), width, height, changed, _moments(image))


def _moments(image: Image) -> tuple[float, ...]:
    sample = image[:: max(1, image.shape[0] // 32), :: max(1, image.shape[1] // 32)]
    mean, deviation = cv2.meanStdDev(np.ascontiguousarray(sample))
    mean, deviation = mean[:, 0] / 255, deviation[:, 0] / 255
    return (*mean.tolist(), *(mean**2 + deviation**2).tolist())
