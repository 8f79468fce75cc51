"""The usual training transform, one image at a time with Pillow: the baseline of ``bench loader``.

It does what torchvision and timm do, operation for operation, without needing either: random
resized crop (torchvision, bilinear), flip, timm's RandAugment 'rand-m9-mstd0.5-inc1', ToTensor and
Normalize (torchvision), timm's RandomErasing in mode 'pixel', and timm's Mixup of a batch. Where
they leave a choice, the cheaper one is taken, so that the baseline is not slowed down: Python's
random numbers, and bilinear interpolation instead of bicubic.
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

from pipeline.data.preprocessing import MEAN, STD

Image = Pillow.Image
Matrix = tuple[float, float, float, float, float, float]  # of an affine map, row by row

# RandAugment
LAYERS = 2
MAGNITUDE = 9
DEVIATION = 0.5
PROBABILITY = 0.5
FILL = (124, 116, 104)
# Random resized crop
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10
# Random erasing
ERASE_PROBABILITY = 0.25
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)
ERASE_TRIES = 10
# Mixup, cutmix and label smoothing
MIXUP = 0.8
CUTMIX = 1.0
CUTMIX_PROBABILITY = 0.5
SMOOTHING = 0.1


class PillowTransform:
    """Image -> float32, shape (3, image_size, image_size), normalised.

    ``full``: with RandAugment and random erasing; else crop and flip only.
    """

    def __init__(self, image_size: int, full: bool) -> None:
        self.image_size = image_size
        self.full = full
        self.mean = torch.tensor(MEAN).view(3, 1, 1)
        self.std = torch.tensor(STD).view(3, 1, 1)

    def __call__(self, image: Image) -> Tensor:
        image = random_resized_crop(image, self.image_size)
        if random.random() < 0.5:
            image = image.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT)
        if self.full:
            image = randaugment(image)
        # A copy, because torch warns about Pillow's read-only buffer.
        pixels = torch.from_numpy(np.array(image, copy=True))
        tensor = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        tensor.sub_(self.mean).div_(self.std)
        if self.full and random.random() < ERASE_PROBABILITY:
            return erase(tensor)
        return tensor


def random_resized_crop(image: Image, size: int) -> Image:
    """A box of random area and aspect ratio, else the largest central one, resized."""
    width, height = image.size
    for _ in range(CROP_TRIES):
        area = width * height * random.uniform(*CROP_AREA)
        ratio = math.exp(random.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        box_width = round(math.sqrt(area * ratio))
        box_height = round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = random.randint(0, width - box_width)
            top = random.randint(0, height - box_height)
            break
    else:
        box_width = min(width, round(height * CROP_RATIO[1]))
        box_height = min(height, round(width / CROP_RATIO[0]))
        left = (width - box_width) // 2
        top = (height - box_height) // 2
    crop = image.crop((left, top, left + box_width, top + box_height))
    return crop.resize((size, size), Pillow.Resampling.BILINEAR)


def randaugment(image: Image) -> Image:
    """Two random operations, each with probability 0.5."""
    for operation in random.choices(_OPERATIONS, k=LAYERS):
        if random.random() <= PROBABILITY:
            level = min(max(random.gauss(MAGNITUDE, DEVIATION), 0.0), 10.0) / 10.0
            image = operation(image, level, random.choice((-1.0, 1.0)))
    return image


def _affine(image: Image, matrix: Matrix) -> Image:
    return image.transform(
        image.size, Pillow.Transform.AFFINE, matrix, Pillow.Resampling.BILINEAR, fillcolor=FILL
    )


def _factor(level: float, sign: float) -> float:
    return max(0.1, 1.0 + sign * level * 0.9)


def _solarize_add(image: Image, added: int) -> Image:
    # Pillow takes one table of 256 entries per channel, one after the other.
    table = [min(255, i + added) if i < 128 else i for i in range(256)]
    return image.point(table * 3)


# In timm's order; arguments: image, level in [0, 1], direction -1 or 1.
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
    lambda image, level, sign: _affine(image, (1, sign * level * 0.3, 0, 0, 1, 0)),
    lambda image, level, sign: _affine(image, (1, 0, 0, sign * level * 0.3, 1, 0)),
    lambda image, level, sign: _affine(image, (1, 0, sign * level * 0.45 * image.size[0], 0, 1, 0)),
    lambda image, level, sign: _affine(image, (1, 0, 0, 0, 1, sign * level * 0.45 * image.size[1])),
)


def erase(image: Tensor) -> Tensor:
    """Fill a random box of a (3, H, W) image with normal noise, in place."""
    channels, height, width = image.shape
    for _ in range(ERASE_TRIES):
        area = random.uniform(*ERASE_AREA) * height * width
        aspect = math.exp(random.uniform(math.log(ERASE_ASPECT[0]), math.log(ERASE_ASPECT[1])))
        box_height = round(math.sqrt(area * aspect))
        box_width = round(math.sqrt(area / aspect))
        if box_height < height and box_width < width:
            top = random.randint(0, height - box_height)
            left = random.randint(0, width - box_width)
            noise = torch.empty(channels, box_height, box_width).normal_()
            image[:, top : top + box_height, left : left + box_width] = noise
            break
    return image


def mixup_or_cutmix(images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mix a batch with itself in reverse order, in place: image i with image n - 1 - i.

    Unlike `pipeline.data.device`, the whole batch shares one lambda and one box, as in timm's mode
    'batch'.

    Returns:
        The images, and soft targets: float32, shape (n, classes).
    """
    height, width = images.shape[2:]
    if random.random() < CUTMIX_PROBABILITY:
        own_share = float(np.random.beta(CUTMIX, CUTMIX))
        half_height = int(height * math.sqrt(1 - own_share)) // 2
        half_width = int(width * math.sqrt(1 - own_share)) // 2
        y = random.randrange(height)
        x = random.randrange(width)
        top = max(y - half_height, 0)
        bottom = min(y + half_height, height)
        left = max(x - half_width, 0)
        right = min(x + half_width, width)
        images[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
        # The border may have cut the box: use the area that was really replaced.
        own_share = 1.0 - (bottom - top) * (right - left) / (height * width)
    else:
        own_share = float(np.random.beta(MIXUP, MIXUP))
        partners = images.flip(0)  # a copy, taken before the images are scaled in place
        images.mul_(own_share).add_(partners.mul_(1.0 - own_share))
    own = smoothed_one_hot(labels, classes, SMOOTHING)
    other = smoothed_one_hot(labels.flip(0), classes, SMOOTHING)
    return images, own * own_share + other * (1.0 - own_share)


def smoothed_one_hot(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Targets, float32, shape (n, classes): each row sums to 1."""
    off = smoothing / classes
    targets = torch.full((len(labels), classes), off)
    return targets.scatter_(1, labels[:, None], 1.0 - smoothing + off)
