"""A contact sheet: training images as stored, as the loader augments them, and as network input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config.schema import AugmentConfig
from pipeline.data.augment import TrainTransform
from pipeline.data.bad_samples import explain
from pipeline.data.dataset import PreparedDataset, Split
from pipeline.data.decode import Image, decode_any
from pipeline.data.device import DeviceAugment
from pipeline.data.network_inputs import NetworkInputs, network_inputs
from pipeline.data.sheet import Caption, RowLabel, Sheet, fitted, scaled, side_of
from pipeline.errors import DataError


@dataclass(frozen=True)
class Settings:
    """The settings that decide the pixels of training images. ``image_size``: side in pixels."""

    image_size: int
    augment: AugmentConfig
    seed: int


def contact_sheet(
    data: PreparedDataset, settings: Settings, epoch: int = 0, rows: int = 8, epochs: int = 4
) -> Image:
    """Draw training images with their augmentations, one image per row.

    The images are taken at equal distances from the whole training split. The columns are:

    - the image as stored;
    - the result of `TrainTransform` in each of ``epochs`` epochs, beginning with ``epoch`` (from 0
      here, as in the keys of the augmentation; the titles count from 1);
    - the network input: the first of these after `DeviceAugment`, with the classes that have the
      largest share of its target. Neighbouring rows are treated as neighbours in a batch, so that
      mixup and cutmix mix them.

    The same arguments give the same sheet.

    Returns:
        uint8, shape (height, width, 3), RGB.

    Raises:
        DataError: if there is no training image, or one cannot be decoded.
    """
    split = data.split("train")
    if not len(split):
        raise DataError(
            "has no training image", place=str(data.path), remedy="prepare the data again"
        )
    samples = np.linspace(0, len(split) - 1, min(rows, len(split))).astype(np.int64)
    stored = [_stored(split, sample) for sample in samples.tolist()]
    augmented = {e: _augmented(split, settings, e, samples) for e in range(epoch, epoch + epochs)}
    inputs = _network_inputs(data, settings, epoch, samples, augmented[epoch])

    side = side_of(settings.image_size)
    sheet = Sheet(rows=len(samples), columns=len(augmented) + 2, side=side)
    sheet.title(_title(data, settings))
    sheet.column(0, "as stored", [fitted(image, side) for image in stored])
    for number, (shown_epoch, images) in enumerate(augmented.items(), 1):
        sheet.column(number, f"epoch {shown_epoch + 1}", [scaled(image, side) for image in images])
    sheet.column(
        len(augmented) + 1,
        f"network, epoch {epoch + 1}",
        [scaled(image, side) for image in inputs.images],
        [Caption([text]) for text in inputs.captions],
    )
    sheet.labels(_labels(data, split, samples, stored))
    return sheet.pixels()


def _labels(
    data: PreparedDataset, split: Split, samples: NDArray[np.int64], stored: Sequence[Image]
) -> list[RowLabel]:
    labels = []
    for sample, image in zip(samples.tolist(), stored, strict=True):
        label = split.label(sample)
        height, width = image.shape[:2]
        details = [data.classes[label], f"{width} x {height} px", f"image {sample}"]
        labels.append(RowLabel(data.class_names[label], details))
    return labels


def _stored(split: Split, sample: int) -> Image:
    try:
        return decode_any(split.image(sample))
    except ValueError as error:
        raise explain(error, split, sample) from error


def _augmented(split: Split, settings: Settings, epoch: int, samples: NDArray[np.int64]) -> Image:
    """The loader's result for each sample: uint8, shape (n, image_size, image_size, 3)."""
    transform = TrainTransform(settings.image_size, settings.augment, settings.seed)
    images = np.empty((len(samples), settings.image_size, settings.image_size, 3), np.uint8)
    # The first view of a sample has the sample's own number.
    draws_of_views = transform.draws(epoch, samples)
    for image, sample, draws in zip(images, samples.tolist(), draws_of_views, strict=True):
        try:
            transform(split.image(sample), draws, image)
        except (ValueError, cv2.error) as error:
            raise explain(error, split, sample) from error
    return images


def _network_inputs(
    data: PreparedDataset, settings: Settings, epoch: int, samples: NDArray[np.int64], images: Image
) -> NetworkInputs:
    views = torch.from_numpy(samples)
    positions = torch.arange(len(samples))
    labels = torch.from_numpy(data.split("train").labels[samples])
    device = DeviceAugment(settings.augment, len(data.classes), settings.seed, train=True)
    batch = device(torch.from_numpy(images), labels, views, positions, epoch)
    return network_inputs(batch, data.class_names, settings.augment.smoothing)


def _title(data: PreparedDataset, settings: Settings) -> str:
    images = len(data.split("train"))
    counts = f"{images:,} training images of {len(data.classes):,} classes"
    return f"{data.path.name}: {counts}; {_describe(settings)}"


def _describe(settings: Settings) -> str:
    """The augmentation that is switched on, for the title."""
    augment = settings.augment
    small, large = augment.crop_scale
    parts = [f"{settings.image_size} px", f"crop {small:g} to {large:g}"]
    if augment.crop_padding > 0:
        parts.append(f"padding {augment.crop_padding:g}")
    parts.append(f"flip {augment.flip:g}")
    if augment.randaugment > 0:
        parts.append(f"RandAugment {augment.randaugment}, std {augment.randaugment_std:g}")
    elif augment.color_jitter > 0:
        parts.append(f"colour jitter {augment.color_jitter:g}")
    parts += [
        f"{name} {value:g}"
        for name in ("random_erasing", "mixup", "cutmix", "smoothing")
        if (value := getattr(augment, name))
    ]
    return ", ".join(parts)
