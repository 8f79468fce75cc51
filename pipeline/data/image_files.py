"""Image files as people have them -> RGB pixels: one decoder for preparation and for ``predict``.

Every format follows the same rules:

    8 bits per channel       as they are
    more bits, integers      the smallest of 8, 10, 12, 14 and 16 bits that holds the largest value
                             becomes the range: 12-bit images in 16-bit files are not dark
    floating point           from 0 to 1, 255 or 65535, whichever is the first to hold the largest
    negative, NaN, beyond    an error: nobody knows what is black and what is white
    alpha                    dropped: the colours are those that the file stores
    EXIF orientation         applied where the caller asks for it; of a TIFF, where it tells how
                             the rows are stored, always

Training reads prepared shards and uses ``decode`` alone, which is faster.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import PngImagePlugin, TiffImagePlugin

from pipeline.data.decode import JPEG_MAGIC, Image, decode_any, decode_jpeg, jpeg_header
from pipeline.sources.image_kinds import HEAD_BYTES, INSTALL_HEIF, can_read_heif, image_kind

# Formats that consist of pixels. Pillow opens others too, among them EPS: a program, which it would
# run (N5).
_FORMATS = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "ICO"]
_DEEP_MODES = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}  # of Pillow
_DEPTHS = (8, 10, 12, 14, 16)  # bits
_FLOAT_RANGES = (1.0, 255.0, 65535.0)
_ORIENTATION = 0x0112  # tag of EXIF and TIFF
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_EXTRA = (256, 257, 258, 338)  # tags of TIFF
_TIFF_PREFIX = 8  # bytes, up to the offset of the first tags
_PNG_BIT_DEPTH = 24  # offset in the file
_EXIF = b"Exif\0\0"
_FIRST_SEGMENTS = 1 << 18  # bytes of a JPEG in which the EXIF data lies
# Text and colour profiles of a PNG, which Pillow limits to 1 MB: workflows and screenshots have
# more.
_PNG_TEXT_BYTES = 256 << 20
_JPEG_END = b"\xff\xd9"
# Warnings of libjpeg after which all pixels are there.
_HARMLESS_WARNINGS = ("extraneous bytes", "Invalid SOS parameters", "Inconsistent progression")
# Pillow's limits are variables of its modules, and threads of ``predict`` share them.
_LIMITS_LOCK = threading.RLock()


class UnusableImage(ValueError):
    """A file is no image, or not a whole one. ``reason``: one of a few words, for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """What the first bytes of a file tell; nothing is decoded.

    ``orientation``: of EXIF, 1 to 8. ``needs_pillow``: OpenCV would give other colours.
    ``is_deep``: more than 8 bits per channel. ``is_cmyk``: of a JPEG.
    """

    kind: str
    width: int
    height: int
    orientation: int = 1
    needs_pillow: bool = False
    is_deep: bool = False
    is_cmyk: bool = False


def read_header(data: bytes, *, orientation: bool) -> ImageHeader:
    """Format and size of an image file.

    Args:
        orientation: read the EXIF orientation, too.

    Raises:
        UnusableImage: it is no image, or its header is damaged.
    """
    if data.startswith(JPEG_MAGIC):
        try:
            height, width, colour_space = jpeg_header(data)
        except ValueError as error:
            raise UnusableImage("undecodable", str(error)) from None
        has_exif = orientation and data.find(_EXIF, 0, _FIRST_SEGMENTS) >= 0
        return ImageHeader(
            kind="JPEG",
            width=width,
            height=height,
            orientation=_jpeg_orientation(data) if has_exif else 1,
            is_cmyk=colour_space in ("CMYK", "YCCK"),
        )
    kind = image_kind(data[:HEAD_BYTES])
    if kind == "HEIF" and not can_read_heif():
        raise UnusableImage("needs_heif", f"HEIC needs another package: {INSTALL_HEIF}")
    if kind == "TIFF":
        return _tiff_header(data)
    with _opened(data, "not_an_image") as image:
        return ImageHeader(
            kind=kind or str(image.format),
            width=image.width,
            height=image.height,
            orientation=_orientation(image) if orientation else 1,
            needs_pillow=kind == "HEIF",  # OpenCV does not know it
            is_deep=image.mode in _DEEP_MODES or (kind == "PNG" and data[_PNG_BIT_DEPTH] == 16),
        )


def decode_file(data: bytes, header: ImageHeader) -> Image:
    """All pixels of an image file, upright as ``header`` says.

    Raises:
        UnusableImage: it is damaged, cut, or its pixels have an unknown range.
    """
    if header.kind == "JPEG" and not header.is_cmyk:
        image = _decode_strictly(data)
    elif header.is_deep:
        image = _decode_deep(data, header.kind)
    elif header.needs_pillow or header.is_cmyk:
        image = _decode_with_pillow(data)
    else:
        try:
            image = decode_any(data)
        except ValueError:
            # OpenCV knows fewer formats than Pillow, but decodes those that it knows faster.
            image = _decode_with_pillow(data)
    return upright(image, header.orientation)


def plain_image(data: bytes, *, orientation: bool) -> bytes:
    """An image file that ``decode`` reads as preparation would have read this one.

    A whole, upright JPEG as it is; anything else as a PNG of the same pixels.

    Args:
        orientation: apply the EXIF orientation.

    Raises:
        UnusableImage: it is no image, or damaged.
    """
    header = read_header(data, orientation=orientation)
    pixels = decode_file(data, header)  # a JPEG too: only decoding shows damage
    if header.kind == "JPEG" and not header.is_cmyk and header.orientation == 1:
        return data
    return bytes(cv2.imencode(".png", np.ascontiguousarray(pixels[..., ::-1]))[1])


def upright(image: Image, orientation: int) -> Image:
    """The image as it was taken. ``orientation``: of EXIF; 1 changes nothing."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)  # reflected at the diagonal
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def to_8_bits(values: NDArray[np.generic]) -> Image:
    """Scale pixels of more than 8 bits by their range; shape (height, width) or (..., channels).

    Raises:
        UnusableImage: the range is unknown.
    """
    low = float(values.min())
    high = float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0:
        raise _unknown_range(low, high)
    if np.issubdtype(values.dtype, np.floating):
        ranges: list[float] = list(_FLOAT_RANGES)
    else:
        ranges = [float(2**depth - 1) for depth in _DEPTHS]
    top = next((top for top in ranges if high <= top), None)
    if top is None:
        raise _unknown_range(low, high)
    return np.asarray(np.rint(values.astype(np.float64) * (255 / top)), dtype=np.uint8)


def _unknown_range(low: float, high: float) -> UnusableImage:
    detail = f"pixels from {low:g} to {high:g}: scale them to 0 to 1, 255 or 65535"
    return UnusableImage("unknown_range", detail)


def _decode_deep(data: bytes, kind: str) -> Image:
    """Decode more than 8 bits per channel."""
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    # OpenCV reads a PGM of 12 bits as if it had 16.
    if pixels is None or kind == "PPM":
        with _opened(data, "undecodable") as image:
            pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        pixels = pixels[..., :-1]  # alpha
    image_8 = to_8_bits(pixels)
    if image_8.ndim == 2 or image_8.shape[2] == 1:
        return np.asarray(cv2.cvtColor(image_8, cv2.COLOR_GRAY2RGB), dtype=np.uint8)
    return np.ascontiguousarray(image_8[..., ::-1])


def _decode_with_pillow(data: bytes) -> Image:
    with _opened(data, "undecodable") as image:
        # RGBa: the colours are multiplied by alpha, and are divided again.
        pixels = image.convert("RGBA") if image.mode == "RGBa" else image
        return np.asarray(pixels.convert("RGB"), dtype=np.uint8)


def _decode_strictly(data: bytes) -> Image:
    """All pixels of a JPEG. Raises UnusableImage, also where a decoder would paint pixels grey."""
    try:
        image: Image = simplejpeg.decode_jpeg(data, "RGB", fastdct=True, strict=True)
        return image
    except ValueError as error:
        problem = str(error)
    if problem == "Premature end of JPEG file":
        # libjpeg says so both when pixels are missing and when only the end marker is. With a
        # marker appended, the second kind decodes without a warning.
        with contextlib.suppress(ValueError):
            whole: Image = simplejpeg.decode_jpeg(
                data + _JPEG_END, "RGB", fastdct=True, strict=True
            )
            return whole
    elif any(warning in problem for warning in _HARMLESS_WARNINGS):
        try:
            return decode_jpeg(data)
        except ValueError as error:  # a second problem follows the harmless one
            raise UnusableImage("corrupt", str(error)) from None
    raise UnusableImage("truncated" if "remature" in problem else "corrupt", problem)


@contextlib.contextmanager
def _opened(data: bytes, reason: str) -> Iterator[Pillow.Image]:
    """Open a file with Pillow. Raises UnusableImage of this reason, also for an error of the body.

    Pillow has limits of its own: here the limit of pixels is the job's ``max_pixels``, which may be
    larger.
    """
    with _LIMITS_LOCK:
        limits = (
            Pillow.MAX_IMAGE_PIXELS,
            PngImagePlugin.MAX_TEXT_CHUNK,
            PngImagePlugin.MAX_TEXT_MEMORY,
        )
        Pillow.MAX_IMAGE_PIXELS = None
        PngImagePlugin.MAX_TEXT_CHUNK = _PNG_TEXT_BYTES
        PngImagePlugin.MAX_TEXT_MEMORY = _PNG_TEXT_BYTES
        try:
            # Pillow also warns, for example of odd EXIF data. What counts is whether it decodes.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Pillow.open(io.BytesIO(data), formats=_formats()) as image:
                    yield image
        except (MemoryError, UnusableImage):
            raise  # the first says nothing about the file
        except Exception as error:
            # Damaged bytes make Pillow's many decoders raise whatever they happen to meet: a
            # damaged AVIF a RuntimeError, others an IndexError or a struct.error. The message is
            # "cannot identify image file <_io.BytesIO ...>", for example; the address is of no use.
            text = str(error).split(" <")[0]
            raise UnusableImage(reason, text or type(error).__name__) from error
        finally:
            (
                Pillow.MAX_IMAGE_PIXELS,
                PngImagePlugin.MAX_TEXT_CHUNK,
                PngImagePlugin.MAX_TEXT_MEMORY,
            ) = limits


def _formats() -> list[str]:
    return [*_FORMATS, "HEIF"] if can_read_heif() else _FORMATS


def _jpeg_orientation(data: bytes) -> int:
    try:
        with _opened(data, "undecodable") as image:
            return _orientation(image)
    except UnusableImage:
        return 1  # the pixels are decoded by another library, which tells whether they are damaged


def _orientation(image: Pillow.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 without one, and for a value that means nothing."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF data may be anything, and never makes an image unusable
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _tiff_header(data: bytes) -> ImageHeader:
    """From the tags alone: Pillow opens no TIFF of three channels in floating point."""
    try:
        file = io.BytesIO(data)
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(_TIFF_PREFIX))
        file.seek(tags.next)
        tags.load(file)
        width = int(tags[_TIFF_WIDTH])
        height = int(tags[_TIFF_HEIGHT])
        bits = tags.get(_TIFF_BITS, (8,))
        is_deep = max(bits if isinstance(bits, tuple) else (bits,)) > 8
    except Exception as error:  # damaged bytes make it raise whatever it meets
        raise UnusableImage("not_an_image", f"TIFF header: {error!r}") from error
    return ImageHeader(
        kind="TIFF",
        width=width,
        height=height,
        # OpenCV multiplies the colours of a TIFF by its alpha.
        needs_pillow=bool(tags.get(_TIFF_EXTRA)) and not is_deep,
        is_deep=is_deep,
    )
