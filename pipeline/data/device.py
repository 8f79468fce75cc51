"""Augmentation on the device, a whole batch at a time: normalise, random erasing, mixup and cutmix, soft targets.

Everything has static shapes, runs without a host sync and is a pure function of (seed, epoch, sample or position), so that
a batch split over micro batches or ranks gives the same images. The definitions are those of timm (RandomErasing in mode
'pixel', Mixup in mode 'pair' with corrected lambda), the published recipe's library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pipeline.config.schema import AugmentConfig
from pipeline.data.rng import uniform

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)
ERASE_TRIES = 4
NOISE_OFFSETS = 4096
QUANTILES = 4096


@dataclass(frozen=True)
class DeviceBatch:
    """What the network and the loss take.

    images: float32 (n, 3, H, W), normalised, channels_last. image01: the same in [0, 1]: what a reconstruction aims at.
    targets: float32 (n, classes), each row sums to 1.
    """

    images: torch.Tensor
    image01: torch.Tensor
    targets: torch.Tensor


class DeviceAugment:
    """Makes a `DeviceBatch` of a uint8 batch. With ``train=False``: normalisation and one-hot targets only."""

    def __init__(self, augment: AugmentConfig, num_classes: int, seed: int, train: bool) -> None:
        self.augment, self.num_classes, self.seed, self.train = augment, num_classes, seed, train
        self._constants: dict[tuple[torch.device, int, int], _Constants] = {}

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        samples: torch.Tensor,
        positions: torch.Tensor,
        epoch: int,
    ) -> DeviceBatch:
        """Augment one micro batch.

        Args:
            images: uint8 (n, H, W, 3), RGB, on the device.
            labels: int64 (n,). samples: int64 (n,), dataset indices: key of erasing.
            positions: int64 (n,), consecutive places in the epoch: 2k and 2k+1 are mixed with each other; one whose
                partner is not in this batch stays unmixed.
            epoch: number of the epoch.
        """
        constants = self._constants_for(images)
        normalised = (
            images.permute(0, 3, 1, 2).to(torch.float32).mul(constants.scale).sub_(constants.shift)
        )
        weight, partner = None, None
        if self.train:
            if self.augment.random_erasing > 0:
                normalised = self._erase(normalised, samples, epoch, constants.noise)
            if self.augment.mixup > 0 or self.augment.cutmix > 0:
                partner, paired = _partners(positions)
                normalised, weight = self._mix(
                    normalised, positions, partner, paired, epoch, constants
                )
        image01 = normalised.mul(constants.std).add_(constants.mean).clamp_(0.0, 1.0)
        return DeviceBatch(normalised, image01, self._targets(labels, weight, partner))

    def _targets(
        self, labels: torch.Tensor, weight: torch.Tensor | None, partner: torch.Tensor | None
    ) -> torch.Tensor:
        smoothing = self.augment.smoothing if self.train else 0.0
        shape = (labels.shape[0], self.num_classes)
        targets = torch.full(
            shape, smoothing / self.num_classes, dtype=torch.float32, device=labels.device
        )
        if weight is None or partner is None:
            return targets.scatter_add_(
                1, labels[:, None], torch.full_like(targets[:, :1], 1.0 - smoothing)
            )
        own = weight[:, None] * (1.0 - smoothing)
        targets.scatter_add_(1, labels[:, None], own)
        return targets.scatter_add_(1, labels[partner][:, None], 1.0 - smoothing - own)

    def _erase(
        self, images: torch.Tensor, samples: torch.Tensor, epoch: int, noise: torch.Tensor
    ) -> torch.Tensor:
        """Fill a random box of some images with normal noise (Zhong et al. 2017; sizes as in timm)."""
        height, width = images.shape[2:]
        draws = uniform(self.seed, epoch, samples, "erase", 4 + 2 * ERASE_TRIES)
        areas = (ERASE_AREA[0] + draws[:, 4::2] * (ERASE_AREA[1] - ERASE_AREA[0])) * (
            height * width
        )
        low, high = (math.log(bound) for bound in ERASE_ASPECT)
        aspects = torch.exp(low + draws[:, 5::2] * (high - low))
        heights, widths = (
            torch.round(torch.sqrt(areas * aspects)),
            torch.round(torch.sqrt(areas / aspects)),
        )
        fits = (heights < height) & (widths < width)
        first = fits.to(torch.int8).argmax(dim=1, keepdim=True)
        box_height, box_width = heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0]
        erased = (draws[:, 0] < self.augment.random_erasing) & fits.any(dim=1)
        top = torch.floor(draws[:, 1] * (height - box_height + 1))
        left = torch.floor(draws[:, 2] * (width - box_width + 1))
        box = (
            _box_mask(height, width, top, top + box_height, left, left + box_width)
            & erased[:, None, None]
        )
        rows = torch.floor(draws[:, 3] * NOISE_OFFSETS).to(torch.int64)
        fill = noise[rows].view(images.shape[0], height, width, 3).permute(0, 3, 1, 2)
        return torch.where(box[:, None], fill, images)

    def _mix(
        self,
        images: torch.Tensor,
        positions: torch.Tensor,
        partner: torch.Tensor,
        paired: torch.Tensor,
        epoch: int,
        constants: _Constants,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix each image with its partner; both take the same lambda and box. Returns the images and their own weight."""
        height, width = images.shape[2:]
        share = self.augment.mixup_switch_prob if self.augment.mixup > 0 else 1.0
        share = share if self.augment.cutmix > 0 else 0.0
        draws = uniform(self.seed, epoch, positions >> 1, "mix", 4)
        cut = draws[:, 0] < share
        smooth_weight = _quantile(constants.mixup, draws[:, 1])
        ratio = torch.sqrt(1.0 - _quantile(constants.cutmix, draws[:, 1]))
        half_height = torch.floor(torch.floor(height * ratio) / 2)
        half_width = torch.floor(torch.floor(width * ratio) / 2)
        middle_y, middle_x = torch.floor(draws[:, 2] * height), torch.floor(draws[:, 3] * width)
        top, bottom = (
            (middle_y - half_height).clamp(min=0),
            (middle_y + half_height).clamp(max=height),
        )
        left, right = (middle_x - half_width).clamp(min=0), (middle_x + half_width).clamp(max=width)
        cut_weight = 1.0 - (bottom - top) * (right - left) / (height * width)
        weight = torch.where(paired, torch.where(cut, cut_weight, smooth_weight), 1.0)
        outside = ~_box_mask(height, width, top, bottom, left, right)
        own = torch.where(
            (cut & paired)[:, None, None], outside.to(torch.float32), weight[:, None, None]
        )[:, None]
        return torch.lerp(images[partner], images, own), weight

    def _constants_for(self, images: torch.Tensor) -> _Constants:
        key = (images.device, images.shape[1], images.shape[2])
        if key not in self._constants:
            self._constants[key] = _Constants(self.augment, self.train, *key)
        return self._constants[key]


class _Constants:
    """What is made once for a device and an image size."""

    def __init__(
        self, augment: AugmentConfig, train: bool, device: torch.device, height: int, width: int
    ) -> None:
        mean, std = (torch.tensor(values, device=device) for values in (MEAN, STD))
        self.mean, self.std = _row(mean, width), _row(std, width)
        self.scale, self.shift = _row(1.0 / (255.0 * std), width), _row(mean / std, width)
        if not train:
            return
        size = height * width * 3
        # One fixed bank of normal numbers; an image's noise is the stretch that begins at its own offset.
        bank = torch.randn(size + 3 * NOISE_OFFSETS, generator=torch.Generator().manual_seed(0)).to(
            device
        )
        self.noise = bank.as_strided((NOISE_OFFSETS, size), (3, 1))
        self.mixup = beta_quantiles(augment.mixup or 1.0).to(device)
        self.cutmix = beta_quantiles(augment.cutmix or 1.0).to(device)


def _row(channels: torch.Tensor, width: int) -> torch.Tensor:
    """(3,) -> (1, 3, 1, width) that repeats it for each pixel of a row: a long inner loop on channels-last images."""
    return channels.view(1, 1, 1, 3).expand(1, 1, width, 3).contiguous().permute(0, 3, 1, 2)


def beta_quantiles(alpha: float) -> torch.Tensor:
    """Quantiles of Beta(alpha, alpha) at 0, 1/QUANTILES, ..., 1: float32, shape (QUANTILES + 1,).

    With x = sin(t)^2 the density over t is proportional to (sin t cos t)^(2 alpha - 1), which the midpoint rule integrates.
    """
    cells = 1 << 17
    middles = (torch.arange(cells, dtype=torch.float64) + 0.5) * (math.pi / 2 / cells)
    density = (torch.sin(middles) * torch.cos(middles)) ** (2 * alpha - 1)
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), density.cumsum(0)])
    cumulative /= cumulative[-1].clone()
    wanted = torch.linspace(0, 1, QUANTILES + 1, dtype=torch.float64)
    above = torch.searchsorted(cumulative, wanted).clamp(1, cells)
    low, high = cumulative[above - 1], cumulative[above]
    angles = (above - 1 + (wanted - low) / (high - low).clamp(min=1e-300)) * (math.pi / 2 / cells)
    return (torch.sin(angles) ** 2).to(torch.float32)


def _quantile(table: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
    place = probability * QUANTILES
    below = place.to(torch.int64)
    return torch.lerp(table[below], table[below + 1], place - below)


def _partners(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index in this batch of each image's neighbour (2k with 2k+1), and whether it is here at all."""
    own = torch.arange(positions.shape[0], device=positions.device)
    candidate = (own + 1 - 2 * (positions & 1)).clamp(0, positions.shape[0] - 1)
    return candidate, positions[candidate] == (positions ^ 1)


def _box_mask(
    height: int,
    width: int,
    top: torch.Tensor,
    bottom: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
) -> torch.Tensor:
    """True inside each box [top, bottom) x [left, right): bool, shape (n, height, width)."""
    y = torch.arange(height, device=top.device)
    x = torch.arange(width, device=top.device)
    rows = (y >= top[:, None]) & (y < bottom[:, None])
    columns = (x >= left[:, None]) & (x < right[:, None])
    return rows[:, :, None] & columns[:, None, :]
