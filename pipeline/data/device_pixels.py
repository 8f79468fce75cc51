"""Pixel work of the device augmentation: normalisation, erasing, blending of pairs.

On a GPU all shapes are static, and an operation touches every pixel: a mask decides what changes,
so that nothing waits for the device. A CPU has nothing to wait for, and its memory is the
bottleneck. There the boxes are read as numbers, and only the pixels that change are touched, in
place. Both ways give the same bits.

All batches here are (n, H, W, 3), contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers that a CPU works on at a time: 256 KiB of float32, which stay in the cache between the
# operations on them.
CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """One box per image, [top, bottom) x [left, right), in pixels: each float32, shape (n,)."""

    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor

    def mask(self, height: int, width: int) -> Tensor:
        """True inside each box: bool, shape (n, height, width, 1)."""
        y = torch.arange(height, device=self.top.device)
        x = torch.arange(width, device=self.top.device)
        rows = (y >= self.top[:, None]) & (y < self.bottom[:, None])
        columns = (x >= self.left[:, None]) & (x < self.right[:, None])
        return (rows[:, :, None] & columns[:, None, :])[..., None]

    def slices(self) -> list[tuple[slice, slice]]:
        """Rows and columns of each box. Waits for the device."""
        edges = torch.stack([self.top, self.bottom, self.left, self.right], 1).to(torch.int64)
        return [
            (slice(top, bottom), slice(left, right)) for top, bottom, left, right in edges.tolist()
        ]


@dataclass(frozen=True, kw_only=True)
class Erasing:
    """What random erasing does to each image.

    erased: bool, shape (n,). boxes: where. offsets: int64, shape (n,), row of the noise bank.
    """

    erased: Tensor
    boxes: Boxes
    offsets: Tensor


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How each image is mixed with its partner.

    partner: index in the micro-batch, int64, shape (n,). present: bool, shape (n,), false for an
    image whose partner is not in the micro-batch. use_cutmix: bool, shape (n,), otherwise mixup.
    boxes: what cutmix takes from the partner. weight: float32, shape (n,), share of the image
    itself.
    """

    partner: Tensor
    present: Tensor
    use_cutmix: Tensor
    boxes: Boxes
    weight: Tensor


def normalise(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return ``images`` (uint8) times ``scale`` minus ``shift``: float32, a new tensor.

    Args:
        scale, shift: float32, shape (3 W,), the three channels repeated for each pixel of a row.
            This gives a long inner loop; a shape of (3,) would give one of length 3.
    """
    if images.device.type != "cpu":
        return _rows(images).to(torch.float32).mul(scale).sub_(shift).view(images.shape)
    normalised = torch.empty(images.shape, dtype=torch.float32)
    for part, pixels in _chunks(images, normalised):
        part.copy_(pixels).mul_(scale).sub_(shift)
    return normalised


def unit_range(normalised: Tensor, std: Tensor, mean: Tensor) -> Tensor:
    """Undo the normalisation: float32 in [0, 1], a new tensor. ``std``, ``mean``: shape (3 W,)."""
    if normalised.device.type != "cpu":
        rows = _rows(normalised).mul(std).add_(mean).clamp_(0.0, 1.0)
        return rows.view(normalised.shape)
    pixels = torch.empty_like(normalised)
    for part, source in _chunks(normalised, pixels):
        torch.mul(source, std, out=part).add_(mean).clamp_(0.0, 1.0)
    return pixels


def erase(images: Tensor, erasing: Erasing, noise: Tensor) -> Tensor:
    """Fill the boxes with noise; may change ``images``.

    Args:
        noise: float32, shape (offsets, 3 H W): one stretch per offset.
    """
    in_place = images.device.type == "cpu"
    return (erase_in_place if in_place else erase_by_mask)(images, erasing, noise)


def erase_by_mask(images: Tensor, erasing: Erasing, noise: Tensor) -> Tensor:
    """``erase`` with static shapes, which waits for nothing."""
    mask = erasing.boxes.mask(*images.shape[1:3]) & erasing.erased[:, None, None, None]
    return torch.where(mask, noise[erasing.offsets].view(images.shape), images)


def erase_in_place(images: Tensor, erasing: Erasing, noise: Tensor) -> Tensor:
    """``erase`` that touches the boxes only."""
    slices = erasing.boxes.slices()
    offsets = erasing.offsets.tolist()
    for i in erasing.erased.nonzero()[:, 0].tolist():
        fill = noise[offsets[i]].view(images.shape[1:])
        images[i][slices[i]] = fill[slices[i]]
    return images


def mix(images: Tensor, mixing: Mixing) -> Tensor:
    """Blend each image with its partner, or exchange a box with it; may change ``images``."""
    in_place = images.device.type == "cpu"
    return (mix_in_place if in_place else mix_by_mask)(images, mixing)


def mix_by_mask(images: Tensor, mixing: Mixing) -> Tensor:
    """``mix`` with static shapes, which waits for nothing."""
    # Cutmix is a blend whose weight is 0 inside the box and 1 outside.
    outside = ~mixing.boxes.mask(*images.shape[1:3])
    pixel_weight = torch.where(
        (mixing.use_cutmix & mixing.present)[:, None, None, None],
        outside.to(torch.float32),
        mixing.weight[:, None, None, None],
    )
    return torch.lerp(images[mixing.partner], images, pixel_weight)


def mix_in_place(images: Tensor, mixing: Mixing) -> Tensor:
    """``mix`` that touches only mixed images, and of those with cutmix only the boxes."""
    slices = mixing.boxes.slices()
    weights = mixing.weight.tolist()
    use_cutmix = mixing.use_cutmix.tolist()
    partners = mixing.partner.tolist()
    for i in mixing.present.nonzero()[:, 0].tolist():
        # Each pair once, from its first image: both have the same box and the same weight.
        if partners[i] < i:
            continue
        first, second = images[i], images[partners[i]]
        if use_cutmix[i]:
            own, others = first[slices[i]], second[slices[i]]
            kept = own.clone()
            own.copy_(others)
            others.copy_(kept)
        else:
            mixed = torch.lerp(second, first, weights[i])
            torch.lerp(first, second, weights[i], out=second)
            first.copy_(mixed)
    return images


def _rows(images: Tensor) -> Tensor:
    """(n, H, W, 3) -> (n H, 3 W), a view."""
    n, height, width, channels = images.shape
    return images.view(n * height, width * channels)


def _chunks(source: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Matching rows of ``target`` and ``source``, about CHUNK numbers per pair."""
    rows = max(1, CHUNK // _rows(source).shape[1])
    return list(zip(_rows(target).split(rows), _rows(source).split(rows), strict=True))
