"""From an encoded image to the pixels of an evaluation: three ways, of which a job chooses one.

    published   as the accuracies of published models are measured: decoded in full, resized by
                Pillow's bicubic filter with the rounding of torchvision; above 224 pixels the whole
                image is resized to the square, whatever its shape
    fast        JPEGs are decoded at a fraction of their size and averaged, then cropped alike
    whole       as fast, with the largest crop: for images that show nothing but their class

Worked example: an image of 500 x 375 pixels (width x height).

    published, 224   short side 256: 341 x 256 (341.3 is cut off); crop from left 58 and top 16,
                     halves rounded to even: (341 - 224) / 2 = 58.5 -> 58
    published, 384   384 x 384
    fast, 224        decoded at 1/1, then 341 x 256; crop from left 58 and top 16
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import simplejpeg
from PIL import Image as Pillow

from pipeline.data.augment import EvalTransform
from pipeline.data.decode import JPEG_MAGIC, Image, jpeg_header

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
Mode = Literal["published", "fast", "whole"]
# Short side before the crop, as a multiple of the image size.
_RESIZE: dict[str, float] = {"fast": 1.143, "whole": 1.0}
MOST_CROPPED = 224  # pixels; larger published models see the whole image
_MODE = "RGB"


class Transform(Protocol):
    """Decodes one image into ``out``: uint8, (image_size, image_size, 3).

    Raises:
        ValueError: the image cannot be decoded.
    """

    def __call__(self, data: memoryview, out: Image) -> None: ...


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a network; ``image_size``: side of the square, in pixels."""

    image_size: int
    mode: Mode = "fast"

    def transform(self) -> Transform:
        if self.mode == "published":
            return PublishedTransform(self.image_size)
        return EvalTransform(self.image_size, _RESIZE[self.mode])

    @property
    def crops(self) -> bool:
        """False if the whole image is resized to the square."""
        return self.mode != "published" or self.image_size <= MOST_CROPPED

    @property
    def short_side(self) -> int:
        """Short side before the crop (pixels)."""
        if self.mode == "published":
            return published_short_side(self.image_size)
        return max(self.image_size, round(self.image_size * _RESIZE[self.mode]))

    @property
    def steps(self) -> str:
        """The same in words."""
        ending = "/ 255, - mean, / std"
        if not self.crops:
            return f"to the square of image_size (bicubic, antialiased), {ending}"
        method = (
            "bicubic, antialiased" if self.mode == "published" else "area; cubic where it enlarges"
        )
        return f"short side to {self.short_side} ({method}), centre crop, {ending}"


def published_short_side(image_size: int) -> int:
    """256 for 224 pixels, and in proportion for other sizes, cut off."""
    return image_size * 256 // 224


class PublishedTransform:
    """The transform of the published evaluations, bit for bit that of timm and torchvision."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, data: memoryview, out: Image) -> None:
        """Decode one image into ``out``. Raises ValueError if it cannot be decoded."""
        size = self.image_size
        image = _decode(data)
        if size > MOST_CROPPED:
            # Pillow's filter widens as it shrinks an image: antialiasing.
            out[...] = np.asarray(image.resize((size, size), Pillow.Resampling.BICUBIC))
            return
        width, height = _resized(*image.size, published_short_side(size))
        resized = image.resize((width, height), Pillow.Resampling.BICUBIC)
        # Python rounds halves to even, as the published crop does.
        left = round((width - size) / 2)
        top = round((height - size) / 2)
        out[...] = np.asarray(resized.crop((left, top, left + size, top + size)))


def _decode(data: memoryview) -> Pillow.Image:
    """Decode an image in full, to RGB. Raises ValueError."""
    # simplejpeg gives the same pixels as Pillow, faster, and other threads run meanwhile. Other
    # colour spaces, such as CMYK, are Pillow's to convert.
    if bytes(data[:3]) == JPEG_MAGIC and jpeg_header(data)[2] in ("YCbCr", "Gray"):
        pixels = simplejpeg.decode_jpeg(
            data, _MODE, fastdct=False, fastupsample=False, strict=False
        )
        return Pillow.fromarray(pixels)
    try:
        with Pillow.open(io.BytesIO(data)) as file:
            return file.convert(_MODE)
    except (OSError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def _resized(width: int, height: int, short_side: int) -> tuple[int, int]:
    """(width, height) with the short side scaled to ``short_side``; the other one is cut off."""
    # The product comes before the quotient, as in torchvision: the rounding of both differs.
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side
