"""Encoded bytes -> training or evaluation image of a fixed size, uint8 on the CPU.

Training: random resized crop (Szegedy et al. 2015), horizontal flip, then RandAugment as published
in timm ('rand-m9-mstd0.5-inc1': two of fifteen operations, each with probability 0.5). Where
RandAugment is off, colour jitter takes its place: timm, and so the published recipes, never apply
both. Every choice comes from random numbers that are a function of (seed, epoch, view), drawn for a
whole batch at once.

Worked example of a crop: an original of 500 x 375 pixels (width x height), image_size 224.

1. The draws choose a box of 30% of the area with aspect ratio 4/3: 274 x 205 at left 100, top 60.
2. Only the rows 0..264 are needed, so the JPEG's header is cut to a height of 272 (`first_rows`).
3. Decoding at half size would leave 137 x 102 pixels of the box, fewer than 224, so the image is
   decoded at full size. (A box of 600 x 480 of an original of 1000 x 750 would be decoded at 1/2.)
4. The box is cut out and resized to 224 x 224.
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
# Layout of the random numbers of one image. Every use has numbers of its own, so that switching one
# operation on or off leaves the choices of the others as they are.
#     0 .. 9    crop: area and aspect ratio of each try
#    10, 11     crop: top and left
#    12         flip
#    13 .. 16   colour jitter: order, and one strength per operation
#    17 .. 26   RandAugment: five numbers per operation, two operations
_CROP_CORNER = 2 * CROP_TRIES
_FLIP = _CROP_CORNER + 2
_JITTER = _FLIP + 1
_RANDAUGMENT = _JITTER + 4
DRAWS = _RANDAUGMENT + 2 * randaugment_ops.DRAWS  # random numbers per image

Box = tuple[int, int, int, int]  # top, left, height, width; with padding also outside the image


class TrainTransform:
    """The training transform for square images of ``image_size`` pixels."""

    def __init__(self, image_size: int, augment: AugmentConfig, seed: int) -> None:
        self.image_size = image_size
        self.augment = augment
        self.seed = seed

    def draws(self, epoch: int, views: NDArray[np.int64]) -> list[list[float]]:
        """Random numbers of each view: DRAWS per view, in [0, 1)."""
        key = key_of("augment", self.seed, epoch)
        numbers: list[list[float]] = uniforms(key, views, DRAWS).tolist()
        return numbers

    def __call__(self, data: memoryview, draws: Sequence[float], out: Image) -> None:
        """Decode and augment one image.

        Args:
            data: the encoded image.
            draws: the random numbers of its view, from `draws`.
            out: receives the result: uint8, shape (image_size, image_size, 3), contiguous.

        Raises:
            ValueError: if the image cannot be decoded.
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
            numbers = draws[_JITTER : _JITTER + 4]
            image = randaugment_ops.color_jitter(image, numbers, self.augment.color_jitter)
        if image is not out:
            out[...] = image

    def _crop(self, data: memoryview, draws: Sequence[float]) -> Image:
        """Decode the randomly chosen part of the image, no larger than needed."""
        if bytes(data[:3]) != JPEG_MAGIC:
            image = decode_any(data)
            return cut(image, crop_box(image.shape[0], image.shape[1], draws, self.augment))

        # 1. Choose the box from the size in the header, before any pixel is decoded.
        full_height, full_width = jpeg_size(data)
        top, left, height, width = crop_box(full_height, full_width, draws, self.augment)

        # 2. Decode no rows below the box, and at the smallest scale that keeps enough pixels.
        data, rows = first_rows(data, full_height, min(full_height, top + height))
        image = decode_jpeg(
            data,
            _min_side(rows, height, self.image_size),
            _min_side(full_width, width, self.image_size),
        )

        # 3. Find the box in the scaled image. The decoder rounds sizes up, so derive the scale
        #    from the sizes that it returned.
        scale_y = image.shape[0] / rows
        scale_x = image.shape[1] / full_width
        scaled_height = max(1, round(height * scale_y))
        scaled_width = max(1, round(width * scale_x))
        return cut(
            image, (round(top * scale_y), round(left * scale_x), scaled_height, scaled_width)
        )


class EvalTransform:
    """The evaluation transform: resize the short side, then take the centre crop.

    Args:
        image_size: side of the square result (pixels).
        resize: short side before the crop, as a factor of ``image_size``.
    """

    def __init__(self, image_size: int, resize: float) -> None:
        self.image_size = image_size
        self.short_side = max(image_size, round(image_size * resize))

    def __call__(self, data: memoryview, out: Image) -> None:
        """Decode one image into ``out``: uint8, shape (image_size, image_size, 3).

        Raises:
            ValueError: if the image cannot be decoded.
        """
        if bytes(data[:3]) == JPEG_MAGIC:
            height, width = jpeg_size(data)
            image = decode_jpeg(data, min(height, self.short_side), min(width, self.short_side))
        else:
            image = decode_any(data)
            height, width = image.shape[:2]
        # Both sides come from the original size: scaled decoding has rounded the decoded one.
        scale = self.short_side / min(height, width)
        resized_width = max(self.short_side, round(width * scale))
        resized_height = max(self.short_side, round(height * scale))
        shrinks = image.shape[0] > resized_height and image.shape[1] > resized_width
        method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        resized = cv2.resize(image, (resized_width, resized_height), interpolation=method)
        top = (resized_height - self.image_size) // 2
        left = (resized_width - self.image_size) // 2
        out[...] = resized[top : top + self.image_size, left : left + self.image_size]


def crop_box(height: int, width: int, draws: Sequence[float], augment: AugmentConfig) -> Box:
    """Choose the random resized crop as torchvision does, in an image with ``crop_padding``.

    Each try draws an area and an aspect ratio. The first box that fits into the image is placed at
    random. If none fits, the largest box with an allowed aspect ratio is taken: the central one, or
    with padding one placed at random.

    Worked example of padding, as on CIFAR (He et al. 2016): 32 x 32 pixels, crop_scale [1, 1],
    crop_ratio [1, 1], crop_padding 0.125. The box has 32 x 32 pixels and its top lies in -4 .. 4.
    """
    small, large = augment.crop_scale
    low, high = augment.crop_ratio
    for attempt in range(CROP_TRIES):
        area = height * width * (small + draws[2 * attempt] * (large - small))
        # Uniform in the logarithm, so that 3/4 and 4/3 are equally likely.
        ratio = math.exp(math.log(low) + draws[2 * attempt + 1] * (math.log(high) - math.log(low)))
        box_width = round(math.sqrt(area * ratio))
        box_height = round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            break
    else:
        ratio = min(max(width / height, low), high)
        box_width = max(1, min(width, round(height * ratio)))
        box_height = max(1, min(height, round(width / ratio)))
        if not augment.crop_padding:
            return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
    top = _offset(height, box_height, draws[_CROP_CORNER], augment.crop_padding)
    left = _offset(width, box_width, draws[_CROP_CORNER + 1], augment.crop_padding)
    return top, left, box_height, box_width


def _offset(side: int, box_side: int, draw: float, padding: float) -> int:
    """Place a box in ``side`` pixels and their padding; at least half of it shows the image."""
    margin = min(round(side * padding), box_side // 2)
    return int(draw * (side - box_side + 2 * margin + 1)) - margin


def cut(image: Image, box: Box) -> Image:
    """The box of an image, as a view where it lies inside; what lies outside is mirrored."""
    top, left, height, width = box
    bottom, right = top + height, left + width
    inside = image[max(top, 0) : bottom, max(left, 0) : right]
    if inside.shape[:2] == (height, width):
        return inside
    padded = cv2.copyMakeBorder(
        inside,
        top=max(-top, 0),
        bottom=max(bottom - image.shape[0], 0),
        left=max(-left, 0),
        right=max(right - image.shape[1], 0),
        borderType=cv2.BORDER_REFLECT_101,
    )
    return np.asarray(padded, dtype=np.uint8)


def _min_side(full: int, part: int, needed: int) -> int:
    """Smallest size of the ``full`` side at which its ``part`` still has ``needed`` pixels."""
    # Example: 274 of 500 columns must give 224 pixels: at least 500 * 224 / 274 = 409 columns.
    return min(full, math.ceil(full * needed / part))


def _interpolation(image: Image, size: int) -> int:
    # Scaled decoding leaves most JPEG crops less than twice as large as needed. There, linear
    # interpolation still uses every pixel and is the faster one; larger crops need averaging.
    return cv2.INTER_AREA if min(image.shape[:2]) >= 2 * size else cv2.INTER_LINEAR
