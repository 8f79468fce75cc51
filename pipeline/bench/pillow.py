"""The usual training transform, one image at a time with Pillow: what torchvision and timm do, operation for operation.

Random resized crop (torchvision, bilinear), flip, timm's RandAugment 'rand-m9-mstd0.5-inc1', ToTensor and Normalize
(torchvision), timm's RandomErasing in mode 'pixel'; and timm's Mixup of a batch. Neither library is needed. Where they leave
a choice the cheaper one is taken: Python's random numbers, bilinear and not bicubic interpolation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import ImageEnhance, ImageOps
from torch import Tensor

from pipeline.data.device import MEAN, STD

Image = Pillow.Image
LAYERS, MAGNITUDE, DEVIATION, PROBABILITY = 2, 9, 0.5, 0.5
FILL = (124, 116, 104)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
ERASING, ERASE_AREA, ERASE_ASPECT, TRIES = 0.25, (0.02, 1 / 3), (0.3, 1 / 0.3), 10
MIXUP, CUTMIX, CUTMIX_SHARE, SMOOTHING = 0.8, 1.0, 0.5, 0.1


class UsualTransform:
    """Image -> float32 (3, image_size, image_size), normalised. ``full``: with RandAugment and erasing."""

    def __init__(self, image_size: int, full: bool) -> None:
        self.image_size, self.full = image_size, full
        self.mean, self.std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)

    def __call__(self, image: Image) -> Tensor:
        image = random_resized_crop(image, self.image_size)
        if random.random() < 0.5:
            image = image.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT)
        if self.full:
            image = randaugment(image)
        tensor = (
            torch.from_numpy(np.array(image, copy=True))
            .permute(2, 0, 1)
            .contiguous()
            .to(torch.float32)
            .div(255)
        )
        tensor.sub_(self.mean).div_(self.std)
        return erase(tensor) if self.full and random.random() < ERASING else tensor


def random_resized_crop(image: Image, size: int) -> Image:
    width, height = image.size
    for _ in range(TRIES):
        area = width * height * random.uniform(*SCALE)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            break
    else:
        w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
        left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h)).resize(
        (size, size), Pillow.Resampling.BILINEAR
    )


def randaugment(image: Image) -> Image:
    for operation in random.choices(_OPERATIONS, k=LAYERS):
        if random.random() <= PROBABILITY:
            level = min(max(random.gauss(MAGNITUDE, DEVIATION), 0.0), 10.0) / 10.0
            image = operation(image, level, random.choice((-1.0, 1.0)))
    return image


def _affine(image: Image, *matrix: float) -> Image:
    return image.transform(
        image.size, Pillow.Transform.AFFINE, matrix, Pillow.Resampling.BILINEAR, fillcolor=FILL
    )


def _factor(level: float, sign: float) -> float:
    return max(0.1, 1.0 + sign * level * 0.9)


def _solarize_add(image: Image, added: int) -> Image:
    table = [min(255, i + added) if i < 128 else i for i in range(256)]
    return image.point(table * 3)


_OPERATIONS: tuple[Callable[[Image, float, float], Image], ...] = (
    lambda image, level, sign: ImageOps.autocontrast(image),
    lambda image, level, sign: ImageOps.equalize(image),
    lambda image, level, sign: ImageOps.invert(image),
    lambda image, level, sign: image.rotate(
        sign * level * 30.0, Pillow.Resampling.BILINEAR, fillcolor=FILL
    ),
    lambda image, level, sign: ImageOps.posterize(image, max(1, 4 - int(level * 4))),
    lambda image, level, sign: ImageOps.solarize(image, 256 - int(level * 256)),
    lambda image, level, sign: _solarize_add(image, int(level * 110)),
    lambda image, level, sign: ImageEnhance.Color(image).enhance(_factor(level, sign)),
    lambda image, level, sign: ImageEnhance.Contrast(image).enhance(_factor(level, sign)),
    lambda image, level, sign: ImageEnhance.Brightness(image).enhance(_factor(level, sign)),
    lambda image, level, sign: ImageEnhance.Sharpness(image).enhance(_factor(level, sign)),
    lambda image, level, sign: _affine(image, 1, sign * level * 0.3, 0, 0, 1, 0),
    lambda image, level, sign: _affine(image, 1, 0, 0, sign * level * 0.3, 1, 0),
    lambda image, level, sign: _affine(image, 1, 0, sign * level * 0.45 * image.size[0], 0, 1, 0),
    lambda image, level, sign: _affine(image, 1, 0, 0, 0, 1, sign * level * 0.45 * image.size[1]),
)


def erase(image: Tensor) -> Tensor:
    """A box of an image becomes normal noise, in place."""
    channels, height, width = image.shape
    for _ in range(TRIES):
        area = random.uniform(*ERASE_AREA) * height * width
        aspect = math.exp(random.uniform(math.log(ERASE_ASPECT[0]), math.log(ERASE_ASPECT[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = random.randint(0, height - h), random.randint(0, width - w)
            image[:, top : top + h, left : left + w] = torch.empty(channels, h, w).normal_()
            break
    return image


def mix(images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of a batch with itself in reverse order, in place, and its soft targets (n, classes)."""
    height, width = images.shape[2:]
    if random.random() < CUTMIX_SHARE:
        share = float(np.random.beta(CUTMIX, CUTMIX))
        half_height, half_width = (
            int(height * math.sqrt(1 - share)) // 2,
            int(width * math.sqrt(1 - share)) // 2,
        )
        y, x = random.randrange(height), random.randrange(width)
        top, bottom, left, right = (
            max(y - half_height, 0),
            min(y + half_height, height),
            max(x - half_width, 0),
            min(x + half_width, width),
        )
        images[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
        share = 1.0 - (bottom - top) * (right - left) / (height * width)
    else:
        share = float(np.random.beta(MIXUP, MIXUP))
        partners = images.flip(0)  # before the batch is scaled in place
        images.mul_(share).add_(partners.mul_(1.0 - share))
    own, other = one_hot(labels, classes, SMOOTHING), one_hot(labels.flip(0), classes, SMOOTHING)
    return images, own * share + other * (1.0 - share)


def one_hot(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    off = smoothing / classes
    return torch.full((len(labels), classes), off).scatter_(
        1, labels[:, None], 1.0 - smoothing + off
    )
