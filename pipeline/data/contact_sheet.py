"""A contact sheet: training images as they are stored, as the loader augments them, and as the network gets them."""

from __future__ import annotations

import io
import textwrap
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

SMALLEST, LARGEST = 128, 192  # side of a picture on the sheet (pixels)
GAP, BELOW, LEFT, HEAD = (
    10,
    18,
    190,
    62,
)  # between pictures; for a line below each; for the names; for the titles
PAPER, INK, FAINT = (250, 250, 248), (20, 20, 20), (120, 120, 120)


@dataclass(frozen=True)
class Settings:
    """What decides the pixels of training images. ``image_size``: side in pixels."""

    image_size: int
    augment: AugmentConfig
    seed: int


def contact_sheet(
    data: PreparedDataset, settings: Settings, epoch: int = 0, rows: int = 8, epochs: int = 4
) -> Image:
    """``rows`` images from all over the training split, one a row: uint8 (height, width, 3), RGB.

    Columns: the image as stored, `TrainTransform`'s result in each of ``epochs`` epochs from ``epoch`` on, and what
    `DeviceAugment` makes of the first of these if neighbours on the sheet are neighbours in a batch, with the classes that
    are most in its target. The same arguments give the same sheet.

    Raises:
        DataError: no training image, or one that cannot be decoded.
    """
    split = data.split("train")
    if not len(split):
        raise DataError(
            "has no training image", place=str(data.path), remedy="prepare the data again"
        )
    samples = np.linspace(0, len(split) - 1, min(rows, len(split))).astype(np.int64)
    stored = [_stored(split, sample) for sample in samples.tolist()]
    columns = [
        (f"epoch {e}", _augmented(split, settings, e, samples))
        for e in range(epoch, epoch + epochs)
    ]
    fed, targets = _fed(data, settings, epoch, samples, columns[0][1])
    captions = [
        (
            data.class_names[split.label(i)],
            data.classes[split.label(i)],
            f"{one.shape[1]} x {one.shape[0]} px",
            f"image {i}",
        )
        for i, one in zip(samples.tolist(), stored, strict=True)
    ]
    side = _side(settings.image_size)
    sheet = _Sheet(len(captions), len(columns) + 2, side)
    sheet.title(
        f"{data.path.name}: {len(split):,} training images of {len(data.classes):,} classes; {_words(settings)}"
    )
    sheet.column(0, "as stored", [_fitted(one, side) for one in stored])
    for number, (title, images) in enumerate(columns, 1):
        sheet.column(number, title, [_scaled(one, side) for one in images])
    sheet.column(
        len(columns) + 1, f"network, epoch {epoch}", [_scaled(one, side) for one in fed], targets
    )
    sheet.names(captions)
    return np.asarray(sheet.image)


def png(image: Image) -> bytes:
    """The image as a PNG file."""
    out = io.BytesIO()
    Pillow.fromarray(image).save(out, "PNG", optimize=True)
    return out.getvalue()


def _stored(split: Split, sample: int) -> Image:
    try:
        return decode_any(split.image(sample))
    except ValueError as error:
        raise explain(error, split, sample) from error


def _augmented(split: Split, settings: Settings, epoch: int, samples: NDArray[np.int64]) -> Image:
    """uint8 (n, image_size, image_size, 3)"""
    transform = TrainTransform(settings.image_size, settings.augment, settings.seed)
    images = np.empty((len(samples), settings.image_size, settings.image_size, 3), np.uint8)
    for image, sample, draws in zip(
        images, samples.tolist(), transform.draws(epoch, samples), strict=True
    ):
        try:
            transform(split.image(sample), draws, image)
        except (ValueError, cv2.error) as error:
            raise explain(error, split, sample) from error
    return images


def _fed(
    data: PreparedDataset, settings: Settings, epoch: int, samples: NDArray[np.int64], images: Image
) -> tuple[Image, list[str]]:
    """Images after the device's part, and in words the classes of each one's target."""
    numbers = torch.from_numpy(samples)
    labels = torch.from_numpy(data.split("train").labels[samples])
    device = DeviceAugment(settings.augment, len(data.classes), settings.seed, train=True)
    batch = device(torch.from_numpy(images), labels, numbers, torch.arange(len(samples)), epoch)
    pixels = (
        batch.image01.mul(255.0).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    )
    shares, classes = batch.targets.topk(min(2, len(data.classes)))
    even = settings.augment.smoothing / len(data.classes)
    words = []
    for some, which in zip(shares.tolist(), classes.tolist(), strict=True):
        parts = [
            f"{share:.0%} {data.class_names[i]}"
            for share, i in zip(some, which, strict=True)
            if share > even + 0.005
        ]
        words.append(", ".join(parts))
    return pixels, words


def _words(settings: Settings) -> str:
    augment = settings.augment
    small, large = augment.crop_scale
    parts = [f"{settings.image_size} px", f"crop {small:g} to {large:g}", f"flip {augment.flip:g}"]
    if augment.randaugment > 0:
        parts.append(f"RandAugment {augment.randaugment}, std {augment.randaugment_std:g}")
    elif augment.color_jitter > 0:
        parts.append(f"colour jitter {augment.color_jitter:g}")
    parts += [
        f"{name} {share:g}"
        for name in ("random_erasing", "mixup", "cutmix", "smoothing")
        if (share := getattr(augment, name))
    ]
    return ", ".join(parts)


def _side(image_size: int) -> int:
    """Small images are shown in whole multiples of their size, so that one sees their pixels."""
    return min(image_size * -(-SMALLEST // image_size), LARGEST)


def _scaled(image: Image, side: int) -> Image:
    method = cv2.INTER_NEAREST if side >= image.shape[0] else cv2.INTER_AREA
    return np.asarray(cv2.resize(image, (side, side), interpolation=method), np.uint8)


def _fitted(image: Image, side: int) -> Image:
    """The whole image in the middle of a square."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    method = cv2.INTER_NEAREST if scale >= 1 else cv2.INTER_AREA
    square = np.full((side, side, 3), PAPER, np.uint8)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = cv2.resize(
        image, size, interpolation=method
    )
    return square


class _Sheet:
    """The paper: a grid of squares, names to the left, titles above."""

    def __init__(self, rows: int, columns: int, side: int) -> None:
        self.side = side
        self.image = Pillow.new(
            "RGB", (LEFT + columns * (side + GAP) + GAP, HEAD + rows * (side + BELOW + GAP)), PAPER
        )
        self._draw = ImageDraw.Draw(self.image)

    def title(self, text: str) -> None:
        self._text((GAP, GAP), text, 15, INK, self.image.width - 2 * GAP)

    def names(self, captions: list[tuple[str, str, str, str]]) -> None:
        for row, (name, *rest) in enumerate(captions):
            y = self._top(row)
            for line in textwrap.wrap(name, 21)[:3]:
                self._text((GAP, y), line, 16, INK, LEFT - 2 * GAP)
                y += 20
            for line in rest:
                self._text((GAP, y), line, 12, FAINT, LEFT - 2 * GAP)
                y += 16

    def column(
        self, number: int, title: str, images: list[Image], below: list[str] | None = None
    ) -> None:
        x = LEFT + number * (self.side + GAP)
        self._text((x, HEAD - 24), title, 13, FAINT, self.side)
        for row, image in enumerate(images):
            self.image.paste(Pillow.fromarray(image), (x, self._top(row)))
            if below:
                self._text((x, self._top(row) + self.side + 3), below[row], 11, FAINT, self.side)

    def _top(self, row: int) -> int:
        return HEAD + row * (self.side + BELOW + GAP)

    def _text(
        self, place: tuple[int, int], text: str, size: int, colour: tuple[int, int, int], width: int
    ) -> None:
        """One line, cut off where there is no more room."""
        font = ImageFont.load_default(size)
        shown = text
        while shown and self._draw.textlength(shown, font) > width:
            text = text[:-1]
            shown = f"{text.rstrip()} ..."
        self._draw.text(place, shown, colour, font)
