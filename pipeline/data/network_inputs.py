"""Training images as the network receives them, with their targets as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.data.decode import Image
from pipeline.data.device import DeviceBatch
from pipeline.data.sheet import Caption, Sheet, scaled, side_of

COLUMNS = 8  # of the sheet of a batch
ROWS = 2  # a pair of mixed images lies side by side in a row


@dataclass(frozen=True)
class NetworkInputs:
    """Images as the network receives them, and the classes of each one's target as text."""

    images: Image  # uint8, (n, image_size, image_size, 3)
    captions: list[str]


def network_inputs(
    batch: DeviceBatch, class_names: Sequence[str], smoothing: float
) -> NetworkInputs:
    """A batch in pixels and words, for example "70% ape, 30% bee". Waits for the device.

    Args:
        smoothing: label smoothing of the targets, 0 to 1.
    """
    pixels = batch.image01().mul(255.0).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    shares, classes = batch.targets.topk(min(2, len(class_names)))
    # Label smoothing gives every class a little. Leave out classes that have no more than that.
    smoothing_share = smoothing / len(class_names)
    captions = []
    for row_shares, row_classes in zip(shares.tolist(), classes.tolist(), strict=True):
        parts = [
            f"{share:.0%} {class_names[label]}"
            for share, label in zip(row_shares, row_classes, strict=True)
            if share > smoothing_share + 0.005
        ]
        captions.append(", ".join(parts))
    return NetworkInputs(pixels.cpu().numpy(), captions)


def batch_sheet(inputs: NetworkInputs, samples: Sequence[int], title: str) -> Image:
    """Draw the first images of a batch, each above its target and its row of the split.

    Args:
        samples: rows of the split, one per image.

    Returns:
        uint8, shape (height, width, 3), RGB.
    """
    count = min(len(inputs.images), COLUMNS * ROWS)
    columns = min(count, COLUMNS)
    side = side_of(inputs.images.shape[1])
    sheet = Sheet(
        rows=-(-count // columns), columns=columns, side=side, label_width=0, caption_lines=2
    )
    sheet.title(title)
    images = [scaled(image, side) for image in inputs.images[:count]]
    captions = [
        Caption([target, f"row {sample}"])
        for target, sample in zip(inputs.captions[:count], samples[:count], strict=True)
    ]
    sheet.tiles(images, captions)
    return sheet.pixels()
