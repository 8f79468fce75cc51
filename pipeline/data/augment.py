"""From encoded bytes to a training or evaluation image of fixed size, in uint8 on the CPU.

Training: random resized crop (Szegedy et al. 2015), horizontal flip, then RandAugment as published in timm
('rand-m9-mstd0.5-inc1': two of fifteen operations, each with probability 0.5), or colour jitter where RandAugment is off:
timm, and so the published recipes, never apply both. Every choice comes from numbers that are a function of
(seed, epoch, sample), drawn for a whole batch at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data import randaugment_ops
from pipeline.data.decode import JPEG_MAGIC, Image, decode_any, decode_jpeg, first_rows, jpeg_size
from pipeline.data.hashing import key_of, uniforms

if TYPE_CHECKING:  # an exported model is used without pydantic, which the schema needs
    from pipeline.config.schema import AugmentConfig

CROP_TRIES = 5
# Places of the random numbers of one image: crop, flip, jitter (order and three strengths), two RandAugment operations.
_PLACE, _FLIP, _JITTER, _RANDAUGMENT = (
    2 * CROP_TRIES,
    2 * CROP_TRIES + 2,
    2 * CROP_TRIES + 3,
    2 * CROP_TRIES + 7,
)
DRAWS = _RANDAUGMENT + 2 * randaugment_ops.DRAWS

Box = tuple[int, int, int, int]  # top, left, height, width


class TrainTransform:
    """The training transform for images of one size (pixels, square)."""

    def __init__(self, image_size: int, augment: AugmentConfig, seed: int) -> None:
        self.image_size, self.augment, self.seed = image_size, augment, seed

    def draws(self, epoch: int, samples: NDArray[np.int64]) -> list[list[float]]:
        """The random numbers of each of ``samples``: DRAWS in [0, 1) for each."""
        numbers: list[list[float]] = uniforms(
            key_of("augment", self.seed, epoch), samples, DRAWS
        ).tolist()
        return numbers

    def __call__(self, data: memoryview, draws: Sequence[float], out: Image) -> None:
        """Decode and augment one image into ``out``, uint8 (image_size, image_size, 3), contiguous.

        Raises ValueError if undecodable.
        """
        size = self.image_size
        crop = self._crop(data, draws)
        cv2.resize(crop, (size, size), dst=out, interpolation=_interpolation(crop, size))
        if draws[_FLIP] < self.augment.flip:
            cv2.flip(out, 1, dst=out)
        image = out
        if self.augment.randaugment > 0:
            for start in (_RANDAUGMENT, _RANDAUGMENT + randaugment_ops.DRAWS):
                numbers = draws[start : start + randaugment_ops.DRAWS]
                image = randaugment_ops.randaugment(
                    image, numbers, self.augment.randaugment, self.augment.randaugment_std
                )
        elif self.augment.color_jitter > 0:
            image = randaugment_ops.color_jitter(
                image, draws[_JITTER : _JITTER + 4], self.augment.color_jitter
            )
        if image is not out:
            out[...] = image

    def _crop(self, data: memoryview, draws: Sequence[float]) -> Image:
        """The randomly chosen part of the image, decoded no larger than needed."""
        if bytes(data[:3]) != JPEG_MAGIC:
            image = decode_any(data)
            top, left, height, width = crop_box(image.shape[0], image.shape[1], draws, self.augment)
            return image[top : top + height, left : left + width]
        full_height, full_width = jpeg_size(data)
        top, left, height, width = crop_box(full_height, full_width, draws, self.augment)
        data, rows = first_rows(data, full_height, top + height)
        image = decode_jpeg(
            data,
            _at_least(rows, height, self.image_size),
            _at_least(full_width, width, self.image_size),
        )
        scale_y, scale_x = image.shape[0] / rows, image.shape[1] / full_width
        y, x = round(top * scale_y), round(left * scale_x)
        return image[
            y : y + max(1, round(height * scale_y)), x : x + max(1, round(width * scale_x))
        ]


class EvalTransform:
    """Short side to ``image_size * resize``, then the centre crop of ``image_size`` (pixels)."""

    def __init__(self, image_size: int, resize: float) -> None:
        self.image_size, self.short_side = image_size, max(image_size, round(image_size * resize))

    def __call__(self, data: memoryview, out: Image) -> None:
        """Decode one image into ``out``, uint8 (image_size, image_size, 3). Raises ValueError if undecodable."""
        if bytes(data[:3]) == JPEG_MAGIC:
            height, width = jpeg_size(data)
            short = self.short_side
            image = decode_jpeg(data, min(height, short), min(width, short))
        else:
            image = decode_any(data)
            height, width = image.shape[:2]
        scale = self.short_side / min(height, width)
        wide, high = (
            max(self.short_side, round(width * scale)),
            max(self.short_side, round(height * scale)),
        )
        method = (
            cv2.INTER_AREA if image.shape[0] > high and image.shape[1] > wide else cv2.INTER_CUBIC
        )
        resized = cv2.resize(image, (wide, high), interpolation=method)
        top, left = (high - self.image_size) // 2, (wide - self.image_size) // 2
        out[...] = resized[top : top + self.image_size, left : left + self.image_size]


def crop_box(height: int, width: int, draws: Sequence[float], augment: AugmentConfig) -> Box:
    """The random resized crop as in torchvision: a box of random area and aspect ratio, else the largest central one."""
    (small, large), (low, high) = augment.crop_scale, augment.crop_ratio
    for attempt in range(CROP_TRIES):
        area = height * width * (small + draws[2 * attempt] * (large - small))
        ratio = math.exp(math.log(low) + draws[2 * attempt + 1] * (math.log(high) - math.log(low)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(draws[_PLACE] * (height - box_height + 1))
            left = int(draws[_PLACE + 1] * (width - box_width + 1))
            return top, left, box_height, box_width
    ratio = min(max(width / height, low), high)
    box_width, box_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    box_width, box_height = max(1, box_width), max(1, box_height)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _at_least(full: int, part: int, wanted: int) -> int:
    """The least size of the whole side at which its ``part`` still has ``wanted`` pixels."""
    return min(full, math.ceil(full * wanted / part))


def _interpolation(image: Image, size: int) -> int:
    # After scaled decoding a JPEG's crop is less than twice too large, where linear interpolation still sees every pixel.
    return cv2.INTER_AREA if min(image.shape[:2]) >= 2 * size else cv2.INTER_LINEAR
