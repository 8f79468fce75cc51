"""Augmentation of a batch on the device: normalisation, random erasing, mixup, cutmix, targets.

The host delivers uint8 batches, which are four times smaller to copy than floats; the device does
the arithmetic. All shapes are static and nothing waits for the device. Every random choice is a
pure function of (seed, epoch, view) or (seed, epoch, position), so that a batch gives the same
images however it is divided into micro-batches or among ranks. The definitions are those of timm,
the library of the published recipe: RandomErasing in mode 'pixel', Mixup in mode 'pair' with
corrected lambda.

Mixup and cutmix pair neighbouring positions: 2k with 2k + 1. Worked example: a micro-batch of five
images at the positions 3..7.

    index in the micro-batch   0    1  2    3  4
    position                   3    4  5    6  7
    partner's index            -    2  1    4  3        position 3 lacks its partner 2: not mixed
    key of the random numbers       2  2    3  3        position // 2: equal for both of a pair

The pair (4, 5) draws one lambda, here 0.7. Image 1 becomes 0.7 * image 1 + 0.3 * image 2 (mixup) or
image 1 with a box of 30% of its area taken from image 2 (cutmix), and image 2 likewise with the
roles exchanged. The targets are weighted in the same proportion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config.schema import AugmentConfig
from pipeline.data import device_pixels
from pipeline.data.device_pixels import Boxes, Erasing, Mixing
from pipeline.data.preprocessing import MEAN, STD
from pipeline.data.rng import uniform

ERASE_AREA = (0.02, 1 / 3)  # of the image's area
ERASE_ASPECT = (0.3, 1 / 0.3)  # height / width
ERASE_TRIES = 4
NOISE_OFFSETS = 4096  # different noise patterns for erased boxes
QUANTILES = 4096


@dataclass(frozen=True, kw_only=True)
class DeviceBatch:
    """Input of the network and of the loss.

    images: float32, shape (n, 3, H, W), normalised, channels_last.
    targets: float32, shape (n, classes); each row sums to 1.
    mean, std: float32, shape (3 W,), of the normalisation.
    """

    images: Tensor
    targets: Tensor
    mean: Tensor
    std: Tensor

    def image01(self) -> Tensor:
        """The images in [0, 1], the target of the reconstruction: float32, shape (n, 3, H, W)."""
        pixels = device_pixels.unit_range(self.images.permute(0, 2, 3, 1), self.std, self.mean)
        return pixels.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Pairs:
    """Mixup partners. ``partner``: index in the micro-batch, int64 (n,); ``present``: bool (n,)."""

    partner: Tensor
    present: Tensor


class DeviceAugment:
    """uint8 batch -> `DeviceBatch`. ``train=False``: only normalisation and one-hot targets."""

    def __init__(self, augment: AugmentConfig, num_classes: int, seed: int, train: bool) -> None:
        self.augment = augment
        self.num_classes = num_classes
        self.seed = seed
        self.train = train
        self._constants: dict[tuple[torch.device, int, int], _Constants] = {}

    @torch.no_grad()
    def __call__(
        self, images: Tensor, labels: Tensor, views: Tensor, positions: Tensor, epoch: int
    ) -> DeviceBatch:
        """Augment one micro-batch.

        Args:
            images: uint8, shape (n, H, W, 3), RGB, contiguous, on the device.
            labels: int64, shape (n,).
            views: int64, shape (n,): key of random erasing.
            positions: int64, shape (n,), consecutive positions in the epoch: 2k and 2k + 1 are
                mixed with each other. An image whose partner is not in this micro-batch is not
                mixed.
            epoch: number of the epoch.
        """
        constants = self._constants_for(images)
        # (x / 255 - mean) / std in one multiplication and one subtraction.
        pixels = device_pixels.normalise(images, constants.scale, constants.shift)
        mixing: Mixing | None = None
        if self.train and self.augment.random_erasing > 0:
            erasing = self._erasing(images, views, epoch)
            pixels = device_pixels.erase(pixels, erasing, constants.noise)
        if self.train and (self.augment.mixup > 0 or self.augment.cutmix > 0):
            draws = uniform(self.seed, epoch, positions >> 1, "mix", 4)
            mixing = self._mixing(images, _pairs(positions), draws, constants)
            pixels = device_pixels.mix(pixels, mixing)
        return DeviceBatch(
            images=pixels.permute(0, 3, 1, 2),
            targets=self._targets(labels, mixing),
            mean=constants.mean,
            std=constants.std,
        )

    def _targets(self, labels: Tensor, mixing: Mixing | None) -> Tensor:
        """Smoothed targets, mixed with those of the partner: float32, shape (n, classes)."""
        # Example: 10 classes, smoothing 0.1, weight 0.7. Every class gets 0.1 / 10 = 0.01; the own
        # class another 0.7 * 0.9 = 0.63, and the partner's class 0.9 - 0.63 = 0.27.
        smoothing = self.augment.smoothing if self.train else 0.0
        shape = (labels.shape[0], self.num_classes)
        targets = torch.full(
            shape, smoothing / self.num_classes, dtype=torch.float32, device=labels.device
        )
        if mixing is None:
            own = torch.full_like(targets[:, :1], 1.0 - smoothing)
            return targets.scatter_add_(1, labels[:, None], own)
        own = mixing.weight[:, None] * (1.0 - smoothing)
        targets.scatter_add_(1, labels[:, None], own)
        return targets.scatter_add_(1, labels[mixing.partner][:, None], 1.0 - smoothing - own)

    def _erasing(self, images: Tensor, views: Tensor, epoch: int) -> Erasing:
        """Choose a box in some images (Zhong et al. 2017; sizes as in timm)."""
        height, width = images.shape[1:3]
        # Random numbers per image: 0 erase or not, 1 top, 2 left, 3 noise, then area and aspect
        # ratio of each try.
        draws = uniform(self.seed, epoch, views, "erase", 4 + 2 * ERASE_TRIES)

        # 1. Sizes of all tries; an image takes the first one that fits. Computing all of them
        #    keeps the shapes static: a loop would have to ask the device which images are done.
        areas = (ERASE_AREA[0] + draws[:, 4::2] * (ERASE_AREA[1] - ERASE_AREA[0])) * (
            height * width
        )
        low, high = (math.log(bound) for bound in ERASE_ASPECT)
        aspects = torch.exp(low + draws[:, 5::2] * (high - low))
        heights = torch.round(torch.sqrt(areas * aspects))
        widths = torch.round(torch.sqrt(areas / aspects))
        fits = (heights < height) & (widths < width)
        first_fit = fits.to(torch.int8).argmax(dim=1, keepdim=True)
        box_height = heights.gather(1, first_fit)[:, 0]
        box_width = widths.gather(1, first_fit)[:, 0]

        # 2. Place the box; there is none where the image is not erased or no try fits.
        top = torch.floor(draws[:, 1] * (height - box_height + 1))
        left = torch.floor(draws[:, 2] * (width - box_width + 1))
        boxes = Boxes(top=top, bottom=top + box_height, left=left, right=left + box_width)
        erased = (draws[:, 0] < self.augment.random_erasing) & fits.any(dim=1)
        offsets = torch.floor(draws[:, 3] * NOISE_OFFSETS).to(torch.int64)
        return Erasing(erased=erased, boxes=boxes, offsets=offsets)

    def _mixing(self, images: Tensor, pairs: Pairs, draws: Tensor, constants: _Constants) -> Mixing:
        """Choose mixup or cutmix for each pair, and its weight.

        Args:
            draws: float32, shape (n, 4), equal for both images of a pair: mixup or cutmix, lambda,
                centre of the box (y, x).
        """
        height, width = images.shape[1:3]
        cutmix_prob = self.augment.mixup_switch_prob if self.augment.mixup > 0 else 1.0
        cutmix_prob = cutmix_prob if self.augment.cutmix > 0 else 0.0
        use_cutmix = draws[:, 0] < cutmix_prob

        # 1. Mixup: lambda is a Beta variate, found by inverting its distribution function.
        mixup_weight = _quantile(constants.mixup, draws[:, 1])

        # 2. Cutmix: a box of the area 1 - lambda around a random centre. The image's border may
        #    cut it, so the weight is computed from the area that is left ("corrected lambda").
        ratio = torch.sqrt(1.0 - _quantile(constants.cutmix, draws[:, 1]))
        half_height = torch.floor(torch.floor(height * ratio) / 2)
        half_width = torch.floor(torch.floor(width * ratio) / 2)
        centre_y = torch.floor(draws[:, 2] * height)
        centre_x = torch.floor(draws[:, 3] * width)
        boxes = Boxes(
            top=(centre_y - half_height).clamp(min=0),
            bottom=(centre_y + half_height).clamp(max=height),
            left=(centre_x - half_width).clamp(min=0),
            right=(centre_x + half_width).clamp(max=width),
        )
        box_area = (boxes.bottom - boxes.top) * (boxes.right - boxes.left)
        cutmix_weight = 1.0 - box_area / (height * width)

        # 3. An image without its partner has the weight 1.
        mixed_weight = torch.where(use_cutmix, cutmix_weight, mixup_weight)
        return Mixing(
            partner=pairs.partner,
            present=pairs.present,
            use_cutmix=use_cutmix,
            boxes=boxes,
            weight=torch.where(pairs.present, mixed_weight, 1.0),
        )

    def _constants_for(self, images: Tensor) -> _Constants:
        key = (images.device, images.shape[1], images.shape[2])
        if key not in self._constants:
            self._constants[key] = _Constants(self.augment, self.train, *key)
        return self._constants[key]


class _Constants:
    """Tensors that are computed once per device and image size."""

    def __init__(
        self, augment: AugmentConfig, train: bool, device: torch.device, height: int, width: int
    ) -> None:
        mean = torch.tensor(MEAN, device=device)
        std = torch.tensor(STD, device=device)
        # Repeated for each pixel of a row, see ``device_pixels.normalise``.
        self.mean = mean.repeat(width)
        self.std = std.repeat(width)
        self.scale = (1.0 / (255.0 * std)).repeat(width)
        self.shift = (mean / std).repeat(width)
        if not train:
            return
        # One fixed bank of normal noise. The noise of an image is the stretch of `size` numbers
        # that begins at its offset; the stretches overlap, so that all 4096 of them fit into little
        # more memory than one.
        size = height * width * 3
        generator = torch.Generator().manual_seed(0)
        bank = torch.randn(size + 3 * NOISE_OFFSETS, generator=generator).to(device)
        self.noise = bank.as_strided((NOISE_OFFSETS, size), (3, 1))
        self.mixup = beta_quantiles(augment.mixup or 1.0).to(device)
        self.cutmix = beta_quantiles(augment.cutmix or 1.0).to(device)


def beta_quantiles(alpha: float) -> Tensor:
    """Quantiles of Beta(alpha, alpha) at 0, 1/QUANTILES, ..., 1: float32, shape (QUANTILES + 1,).

    A Beta variate is then one table look-up of one uniform number: no rejection loop, and the same
    result on every device.
    """
    # Substitute x = sin(t)^2: the density over t is proportional to (sin t cos t)^(2 alpha - 1).
    # That removes the poles of the Beta density at 0 and 1 for alpha >= 0.5 and weakens them for
    # smaller alpha, so that the midpoint rule is accurate.
    intervals = 1 << 17
    step = math.pi / 2 / intervals
    midpoints = (torch.arange(intervals, dtype=torch.float64) + 0.5) * step
    density = (torch.sin(midpoints) * torch.cos(midpoints)) ** (2 * alpha - 1)
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), density.cumsum(0)])
    cumulative /= cumulative[-1].clone()
    # Invert the distribution function: linear interpolation between the two nearest angles.
    probabilities = torch.linspace(0, 1, QUANTILES + 1, dtype=torch.float64)
    above = torch.searchsorted(cumulative, probabilities).clamp(1, intervals)
    low = cumulative[above - 1]
    high = cumulative[above]
    angles = (above - 1 + (probabilities - low) / (high - low).clamp(min=1e-300)) * step
    return (torch.sin(angles) ** 2).to(torch.float32)


def _quantile(table: Tensor, probability: Tensor) -> Tensor:
    """Interpolate a table of `beta_quantiles`."""
    index = probability * QUANTILES
    below = index.to(torch.int64)
    return torch.lerp(table[below], table[below + 1], index - below)


def _pairs(positions: Tensor) -> Pairs:
    """Pair the positions 2k and 2k + 1."""
    own = torch.arange(positions.shape[0], device=positions.device)
    # Positions are consecutive: the partner is the next index for an even position, else the
    # previous one. At the ends of the micro-batch the index may be out of range: clamp it, and
    # compare positions to see whether the partner is really there.
    partner = (own + 1 - 2 * (positions & 1)).clamp(0, positions.shape[0] - 1)
    return Pairs(partner, positions[partner] == (positions ^ 1))
