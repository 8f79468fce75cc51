"""The image operations of RandAugment and colour jitter on uint8 RGB, with OpenCV and look-up tables.

Each is what Pillow's ImageOps, ImageEnhance and affine transform do, to within rounding, and takes its strength as timm's
RandAugment states it ('inc': severity grows with the magnitude).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.decode import Image

Table = NDArray[np.uint8]
DRAWS = 5  # random numbers that one RandAugment operation takes
PROBABILITY = 0.5
FILL = (124, 116, 104)  # ImageNet's mean colour, where a shifted image leaves nothing
LUMA = (0.299, 0.587, 0.114)
_LEVELS = np.arange(256, dtype=np.float64)


def randaugment(image: Image, draws: Sequence[float], magnitude: float, deviation: float) -> Image:
    """One operation of RandAugment (Cubuk et al. 2019) with probability 0.5, else the image itself.

    Args:
        draws: DRAWS numbers in [0, 1): operation, whether, strength (two), direction.
        magnitude: mean strength, 0 to 10. deviation: its standard deviation.
    """
    if draws[1] >= PROBABILITY:
        return image
    normal = math.sqrt(-2.0 * math.log(1.0 - draws[2])) * math.cos(2.0 * math.pi * draws[3])
    level = min(max(magnitude + deviation * normal, 0.0), 10.0) / 10.0
    operation = _CHOICES[int(draws[0] * len(_CHOICES))]
    return operation(image, level, -1.0 if draws[4] < 0.5 else 1.0)


def color_jitter(image: Image, draws: Sequence[float], strength: float) -> Image:
    """Brightness, contrast and saturation by factors in [1 - strength, 1 + strength], in random order (draws[0])."""
    steps = [brighten, contrast, saturate]
    factors = [max(0.0, 1.0 + strength * (2.0 * draw - 1.0)) for draw in draws[1:4]]
    order = int(draws[0] * 6)
    for i in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))[order]:
        image = steps[i](image, factors[i])
    return image


def brighten(image: Image, factor: float) -> Image:
    """Blend with black."""
    return _look_up(image, _table(_LEVELS * factor))


def contrast(image: Image, factor: float) -> Image:
    """Blend with the image's mean grey."""
    red, green, blue, _ = cv2.mean(image)
    grey = int(LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + 0.5)
    return _look_up(image, _table(grey + factor * (_LEVELS - grey)))


def saturate(image: Image, factor: float) -> Image:
    """Blend with the image in grey."""
    matrix = factor * np.eye(3) + (1.0 - factor) * np.tile(LUMA, (3, 1))
    return _image(cv2.transform(image, matrix))


def sharpen(image: Image, factor: float) -> Image:
    """Blend with the image smoothed (3 x 3, centre 5, the rest 1); the border stays as it is."""
    kernel = np.full((3, 3), (1.0 - factor) / 13.0)
    kernel[1, 1] = (1.0 - factor) * 5.0 / 13.0 + factor
    sharp = _image(cv2.filter2D(image, -1, kernel))
    sharp[0], sharp[-1], sharp[:, 0], sharp[:, -1] = image[0], image[-1], image[:, 0], image[:, -1]
    return sharp


def autocontrast(image: Image) -> Image:
    """Stretch each channel to the whole range."""
    planes, tables = cv2.split(image), []
    for plane in planes:
        low, high = cv2.minMaxLoc(plane)[:2]
        tables.append(
            _table((_LEVELS - low) * (255.0 / (high - low))) if high > low else _identity()
        )
    return _look_up_each(planes, tables)


def equalize(image: Image) -> Image:
    """Even out each channel's histogram, as Pillow does."""
    planes, tables = cv2.split(image), []
    for plane in planes:
        counts = cv2.calcHist([plane], [0], None, [256], [0, 256]).ravel().astype(np.int64)
        present = counts[counts > 0]
        step = (int(present.sum()) - int(present[-1])) // 255
        before = np.cumsum(counts) - counts
        tables.append(_table((step // 2 + before) // step) if step > 0 else _identity())
    return _look_up_each(planes, tables)


def posterize(image: Image, bits: int) -> Image:
    """Keep the ``bits`` highest bits."""
    return image & np.uint8(256 - (1 << (8 - bits)))


def solarize(image: Image, threshold: int) -> Image:
    """Invert what is not below ``threshold``."""
    return _look_up(image, _table(np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS)))


def solarize_add(image: Image, added: int) -> Image:
    """Brighten the darker half by ``added``."""
    return _look_up(image, _table(np.where(_LEVELS < 128, _LEVELS + added, _LEVELS)))


def affine(image: Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image:
    """Take the pixel at (x, y) from (a x + b y + c, d x + e y + f), counted from the image's corner, bilinearly."""
    # Pillow counts from the corner of the corner pixel, OpenCV from its middle.
    matrix = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    size, flags = (image.shape[1], image.shape[0]), cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    four = cv2.cvtColor(
        image, cv2.COLOR_RGB2RGBA
    )  # of four channels OpenCV's loop is vectorised, twice as fast
    return _image(
        cv2.cvtColor(
            cv2.warpAffine(four, matrix, size, flags=flags, borderValue=FILL), cv2.COLOR_RGBA2RGB
        )
    )


def rotate(image: Image, degrees: float) -> Image:
    """Turn about the centre, counter-clockwise."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = image.shape[1] / 2, image.shape[0] / 2
    # The inverse map, in image coordinates, whose y points down.
    return affine(image, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def _increasing(
    change: Callable[[Image, float], Image], image: Image, level: float, sign: float
) -> Image:
    return change(image, max(0.1, 1.0 + sign * level * 0.9))


Operation = Callable[[Image, float, float], Image]  # image, level in [0, 1], direction -1 or 1

OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, level, sign: autocontrast(image),
    "Equalize": lambda image, level, sign: equalize(image),
    "Invert": lambda image, level, sign: _image(cv2.bitwise_not(image)),
    "Rotate": lambda image, level, sign: rotate(image, sign * level * 30.0),
    "PosterizeIncreasing": lambda image, level, sign: posterize(image, 4 - int(level * 4)),
    "SolarizeIncreasing": lambda image, level, sign: solarize(image, 256 - int(level * 256)),
    "SolarizeAdd": lambda image, level, sign: solarize_add(image, int(level * 110)),
    "ColorIncreasing": functools.partial(_increasing, saturate),
    "ContrastIncreasing": functools.partial(_increasing, contrast),
    "BrightnessIncreasing": functools.partial(_increasing, brighten),
    "SharpnessIncreasing": functools.partial(_increasing, sharpen),
    "ShearX": lambda image, level, sign: affine(image, 1, sign * level * 0.3, 0, 0, 1, 0),
    "ShearY": lambda image, level, sign: affine(image, 1, 0, 0, sign * level * 0.3, 1, 0),
    "TranslateXRel": lambda image, level, sign: affine(
        image, 1, 0, sign * level * 0.45 * image.shape[1], 0, 1, 0
    ),
    "TranslateYRel": lambda image, level, sign: affine(
        image, 1, 0, 0, 0, 1, sign * level * 0.45 * image.shape[0]
    ),
}
_CHOICES = tuple(OPERATIONS.values())


def _image(array: object) -> Image:
    return np.asarray(array, dtype=np.uint8)


def _table(values: NDArray[np.float64] | NDArray[np.int64]) -> Table:
    return np.clip(values, 0, 255).astype(np.uint8)


def _identity() -> Table:
    return np.arange(256, dtype=np.uint8)


def _look_up(image: Image, table: Table) -> Image:
    """Replace each value by the table's (256,)."""
    return _image(cv2.LUT(image, table))


def _look_up_each(planes: Sequence[cv2.typing.MatLike], tables: Sequence[Table]) -> Image:
    """The image of ``planes``, each changed by its own table."""
    return _image(
        cv2.merge([cv2.LUT(plane, table) for plane, table in zip(planes, tables, strict=True)])
    )
