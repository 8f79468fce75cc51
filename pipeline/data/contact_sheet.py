"""A contact sheet: training images as stored, as the loader augments them, and as network input."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from pipeline.config.schema import AugmentConfig
from pipeline.data.augment import TrainTransform
from pipeline.data.bad_samples import explain
from pipeline.data.dataset import PreparedDataset, Split
from pipeline.data.decode import Image, decode_any
from pipeline.data.device import DeviceAugment
from pipeline.errors import DataError

Color = tuple[int, int, int]  # RGB

# The layout, in pixels.
MIN_SIDE = 128  # of an image on the sheet
MAX_SIDE = 192
GAP = 10  # between images
CAPTION_HEIGHT = 18  # one line below each image
LABEL_WIDTH = 190  # class names and numbers, left of the images
HEADER_HEIGHT = 62  # title and column titles

BACKGROUND: Color = (250, 250, 248)
BLACK: Color = (20, 20, 20)
GREY: Color = (120, 120, 120)


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

    side = _side(settings.image_size)
    sheet = _Sheet(rows=len(samples), columns=len(augmented) + 2, side=side)
    sheet.title(_title(data, settings))
    sheet.column(0, "as stored", [_fitted(image, side) for image in stored])
    for number, (shown_epoch, images) in enumerate(augmented.items(), 1):
        sheet.column(number, f"epoch {shown_epoch + 1}", [_scaled(image, side) for image in images])
    sheet.column(
        len(augmented) + 1,
        f"network, epoch {epoch + 1}",
        [_scaled(image, side) for image in inputs.images],
        inputs.captions,
    )
    sheet.labels(_labels(data, split, samples, stored))
    return np.asarray(sheet.image)


def png(image: Image) -> bytes:
    """Encode an image as PNG."""
    out = io.BytesIO()
    Pillow.fromarray(image).save(out, "PNG", optimize=True)
    return out.getvalue()


@dataclass(frozen=True)
class RowLabel:
    """Text beside a row: class name in large print, then smaller lines."""

    class_name: str
    details: list[str]


@dataclass(frozen=True)
class NetworkInputs:
    """Images as the network receives them, and the classes of each one's target as text."""

    images: Image  # uint8, (n, image_size, image_size, 3)
    captions: list[str]


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
    pixels = batch.image01().mul(255.0).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    shares, classes = batch.targets.topk(min(2, len(data.classes)))
    # Label smoothing gives every class a little. Leave out classes that have no more than that.
    smoothing_share = settings.augment.smoothing / len(data.classes)
    captions = []
    for row_shares, row_classes in zip(shares.tolist(), classes.tolist(), strict=True):
        parts = [
            f"{share:.0%} {data.class_names[label]}"
            for share, label in zip(row_shares, row_classes, strict=True)
            if share > smoothing_share + 0.005
        ]
        captions.append(", ".join(parts))
    return NetworkInputs(pixels.numpy(), captions)


def _title(data: PreparedDataset, settings: Settings) -> str:
    images = len(data.split("train"))
    counts = f"{images:,} training images of {len(data.classes):,} classes"
    return f"{data.path.name}: {counts}; {_describe(settings)}"


def _describe(settings: Settings) -> str:
    """The augmentation that is switched on, for the title."""
    augment = settings.augment
    small, large = augment.crop_scale
    parts = [f"{settings.image_size} px", f"crop {small:g} to {large:g}", f"flip {augment.flip:g}"]
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


def _side(image_size: int) -> int:
    """Side of the images on the sheet (pixels)."""
    # Enlarge small images by a whole number, so that each of their pixels is a square.
    # Example: 32 pixels become 4 * 32 = 128; 96 become 192, and 224 shrink to 192.
    return min(image_size * -(-MIN_SIDE // image_size), MAX_SIDE)


def _scaled(image: Image, side: int) -> Image:
    """Resize a square image."""
    method = cv2.INTER_NEAREST if side >= image.shape[0] else cv2.INTER_AREA
    return np.asarray(cv2.resize(image, (side, side), interpolation=method), np.uint8)


def _fitted(image: Image, side: int) -> Image:
    """Resize the whole image to fit into a square, and centre it."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    fitted_width = max(1, round(width * scale))
    fitted_height = max(1, round(height * scale))
    method = cv2.INTER_NEAREST if scale >= 1 else cv2.INTER_AREA
    resized = cv2.resize(image, (fitted_width, fitted_height), interpolation=method)
    square = np.full((side, side, 3), BACKGROUND, np.uint8)
    top = (side - fitted_height) // 2
    left = (side - fitted_width) // 2
    square[top : top + fitted_height, left : left + fitted_width] = resized
    return square


class _Sheet:
    """The drawing: a grid of squares with row labels to the left and column titles above."""

    def __init__(self, rows: int, columns: int, side: int) -> None:
        self.side = side
        width = LABEL_WIDTH + columns * (side + GAP) + GAP
        height = HEADER_HEIGHT + rows * (side + CAPTION_HEIGHT + GAP)
        self.image = Pillow.new("RGB", (width, height), BACKGROUND)
        self._draw = ImageDraw.Draw(self.image)

    def title(self, text: str) -> None:
        self._text(text, (GAP, GAP), 15, BLACK, width=self.image.width - 2 * GAP)

    def labels(self, labels: Sequence[RowLabel]) -> None:
        width = LABEL_WIDTH - 2 * GAP
        for row, label in enumerate(labels):
            y = self._top(row)
            for line in textwrap.wrap(label.class_name, 21)[:3]:
                self._text(line, (GAP, y), 16, BLACK, width=width)
                y += 20
            for line in label.details:
                self._text(line, (GAP, y), 12, GREY, width=width)
                y += 16

    def column(
        self,
        number: int,
        title: str,
        images: Sequence[Image],
        captions: Sequence[str] | None = None,
    ) -> None:
        x = LABEL_WIDTH + number * (self.side + GAP)
        self._text(title, (x, HEADER_HEIGHT - 24), 13, GREY, width=self.side)
        for row, image in enumerate(images):
            self.image.paste(Pillow.fromarray(image), (x, self._top(row)))
            if captions:
                below = self._top(row) + self.side + 3
                self._text(captions[row], (x, below), 11, GREY, width=self.side)

    def _top(self, row: int) -> int:
        return HEADER_HEIGHT + row * (self.side + CAPTION_HEIGHT + GAP)

    def _text(
        self, text: str, corner: tuple[int, int], size: int, color: Color, *, width: int
    ) -> None:
        """Draw one line, shortened with "..." if it is wider than ``width``."""
        font = ImageFont.load_default(size)
        shown = text
        while shown and self._draw.textlength(shown, font) > width:
            text = text[:-1]
            shown = f"{text.rstrip()} ..."
        self._draw.text(corner, shown, color, font)
