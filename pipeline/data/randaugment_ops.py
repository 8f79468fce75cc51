"""The operations of RandAugment and colour jitter on uint8 RGB, with OpenCV and look-up tables.

Each operation gives what Pillow's ImageOps, ImageEnhance or affine transform gives, to within
rounding, in a fraction of the time. Its strength follows timm's RandAugment ('inc': the effect
grows with the magnitude).

An operation on single values is a table of 256 entries. Example: ``brighten(image, 1.5)`` computes
table[v] = min(255, 1.5 * v) for the 256 values and then looks up each pixel, in place of a float
multiplication per pixel.
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
Matrix = tuple[float, float, float, float, float, float]  # of an affine map, row by row
DRAWS = 5  # random numbers per RandAugment operation
PROBABILITY = 0.5
FILL = (124, 116, 104)  # ImageNet's mean colour, for pixels that a shifted image does not cover
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in grey, as in Pillow
JITTER_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
_LEVELS = np.arange(256, dtype=np.float64)


def randaugment(image: Image, draws: Sequence[float], magnitude: float, deviation: float) -> Image:
    """Apply one random operation of RandAugment (Cubuk et al. 2019) with probability 0.5.

    Args:
        draws: DRAWS numbers in [0, 1): operation, apply or not, strength (two), direction.
        magnitude: mean strength, 0 to 10.
        deviation: standard deviation of the strength.
    """
    if draws[1] >= PROBABILITY:
        return image
    # Box-Muller: two uniform numbers give a normal one. 1 - draw is in (0, 1], so the log is
    # finite.
    normal = math.sqrt(-2.0 * math.log(1.0 - draws[2])) * math.cos(2.0 * math.pi * draws[3])
    level = min(max(magnitude + deviation * normal, 0.0), 10.0) / 10.0
    operation = _CHOICES[int(draws[0] * len(_CHOICES))]
    return operation(image, level, -1.0 if draws[4] < 0.5 else 1.0)


def color_jitter(image: Image, draws: Sequence[float], strength: float) -> Image:
    """Change brightness, contrast and saturation, in random order.

    Args:
        draws: four numbers in [0, 1): order, then one factor per operation.
        strength: the factors are in [1 - strength, 1 + strength].
    """
    operations = (brighten, contrast, saturate)
    factors = [max(0.0, 1.0 + strength * (2.0 * draw - 1.0)) for draw in draws[1:4]]
    for i in JITTER_ORDERS[int(draws[0] * len(JITTER_ORDERS))]:
        image = operations[i](image, factors[i])
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
    """Blend with the smoothed image (3 x 3, centre 5, the others 1). The border is unchanged."""
    # The blend factor * image + (1 - factor) * smoothed is itself one 3 x 3 filter.
    kernel = np.full((3, 3), (1.0 - factor) / 13.0)
    kernel[1, 1] = (1.0 - factor) * 5.0 / 13.0 + factor
    sharpened = _image(cv2.filter2D(image, -1, kernel))
    sharpened[0] = image[0]
    sharpened[-1] = image[-1]
    sharpened[:, 0] = image[:, 0]
    sharpened[:, -1] = image[:, -1]
    return sharpened


def autocontrast(image: Image) -> Image:
    """Stretch each channel to the full range."""
    planes = cv2.split(image)
    tables = []
    for plane in planes:
        low, high = cv2.minMaxLoc(plane)[:2]
        stretches = high > low  # else the channel is constant, and stays as it is
        table = _table((_LEVELS - low) * (255.0 / (high - low))) if stretches else _identity()
        tables.append(table)
    return _look_up_planes(planes, tables)


def equalize(image: Image) -> Image:
    """Flatten each channel's histogram, as Pillow does."""
    planes = cv2.split(image)
    tables = []
    for plane in planes:
        counts = cv2.calcHist([plane], [0], None, [256], [0, 256]).ravel().astype(np.int64)
        # Each output level should get `step` pixels; Pillow leaves the highest level that occurs
        # out of the sum. Level v goes to (pixels below v, plus half a step) / step.
        present = counts[counts > 0]
        step = (int(present.sum()) - int(present[-1])) // 255
        below = np.cumsum(counts) - counts
        tables.append(_table((step // 2 + below) // step) if step > 0 else _identity())
    return _look_up_planes(planes, tables)


def posterize(image: Image, bits: int) -> Image:
    """Keep the ``bits`` highest bits of each value."""
    return image & np.uint8(256 - (1 << (8 - bits)))


def solarize(image: Image, threshold: int) -> Image:
    """Invert the values from ``threshold`` on."""
    return _look_up(image, _table(np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS)))


def solarize_add(image: Image, added: int) -> Image:
    """Brighten the darker half of the values by ``added``."""
    return _look_up(image, _table(np.where(_LEVELS < 128, _LEVELS + added, _LEVELS)))


def affine(image: Image, matrix: Matrix) -> Image:
    """Take the pixel at (x, y) from (a x + b y + c, d x + e y + f), interpolated bilinearly.

    Args:
        matrix: (a, b, c, d, e, f), for coordinates counted from the image's corner, as in Pillow.
    """
    a, b, c, d, e, f = matrix
    # Pillow counts from the corner of the corner pixel, OpenCV from its centre: shift by half a
    # pixel.
    centred = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    size = (image.shape[1], image.shape[0])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    # OpenCV vectorises its loop for four channels and not for three: convert there and back.
    rgba = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
    warped = cv2.warpAffine(rgba, centred, size, flags=flags, borderValue=FILL)
    return _image(cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB))


def rotate(image: Image, degrees: float) -> Image:
    """Rotate about the centre, counter-clockwise."""
    cos = math.cos(math.radians(degrees))
    sin = math.sin(math.radians(degrees))
    x = image.shape[1] / 2
    y = image.shape[0] / 2
    # The inverse map, in image coordinates, where y points down.
    matrix = (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)
    return affine(image, matrix)


def _enhance(
    operation: Callable[[Image, float], Image], image: Image, level: float, sign: float
) -> Image:
    """Blend by a factor in [0.1, 1.9]; 1 leaves the image unchanged. timm's 'Increasing' rule."""
    return operation(image, max(0.1, 1.0 + sign * level * 0.9))


Operation = Callable[[Image, float, float], Image]  # image, level in [0, 1], direction -1 or 1

OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, level, sign: autocontrast(image),
    "Equalize": lambda image, level, sign: equalize(image),
    "Invert": lambda image, level, sign: _image(cv2.bitwise_not(image)),
    "Rotate": lambda image, level, sign: rotate(image, sign * level * 30.0),
    "PosterizeIncreasing": lambda image, level, sign: posterize(image, 4 - int(level * 4)),
    "SolarizeIncreasing": lambda image, level, sign: solarize(image, 256 - int(level * 256)),
    "SolarizeAdd": lambda image, level, sign: solarize_add(image, int(level * 110)),
    "ColorIncreasing": functools.partial(_enhance, saturate),
    "ContrastIncreasing": functools.partial(_enhance, contrast),
    "BrightnessIncreasing": functools.partial(_enhance, brighten),
    "SharpnessIncreasing": functools.partial(_enhance, sharpen),
    "ShearX": lambda image, level, sign: affine(image, (1, sign * level * 0.3, 0, 0, 1, 0)),
    "ShearY": lambda image, level, sign: affine(image, (1, 0, 0, sign * level * 0.3, 1, 0)),
    "TranslateXRel": lambda image, level, sign: affine(
        image, (1, 0, sign * level * 0.45 * image.shape[1], 0, 1, 0)
    ),
    "TranslateYRel": lambda image, level, sign: affine(
        image, (1, 0, 0, 0, 1, sign * level * 0.45 * image.shape[0])
    ),
}
_CHOICES = tuple(OPERATIONS.values())  # a draw selects by index, so the order matters


def _image(array: object) -> Image:
    """OpenCV's result, whose type is unknown to mypy, as an image."""
    return np.asarray(array, dtype=np.uint8)


def _table(values: NDArray[np.float64] | NDArray[np.int64]) -> Table:
    """Clip to [0, 255] and round down."""
    return np.clip(values, 0, 255).astype(np.uint8)


def _identity() -> Table:
    return np.arange(256, dtype=np.uint8)


def _look_up(image: Image, table: Table) -> Image:
    """Replace each value by ``table[value]``; ``table`` has the shape (256,)."""
    return _image(cv2.LUT(image, table))


def _look_up_planes(planes: Sequence[cv2.typing.MatLike], tables: Sequence[Table]) -> Image:
    """Replace the values of each channel by those of its own table, and merge the channels."""
    channels = [cv2.LUT(plane, table) for plane, table in zip(planes, tables, strict=True)]
    return _image(cv2.merge(channels))
