"""Accuracy over a validation split: every image exactly once, for any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from pipeline.data.device import DeviceAugment
from pipeline.data.loader import EvalLoader
from pipeline.model import Output

SAMPLES = 8  # inputs that are shown with their reconstructions: one row of the grid


@dataclass(kw_only=True)
class Accuracy:
    """The result over all ranks: number of images, shares of correct answers, mean loss.

    ``samples``: the first inputs of this rank, then their reconstructions at each position; each
    (up to SAMPLES, 3, H, W) in [0, 1].
    """

    images: int
    top1: float
    top5: float
    loss: float
    samples: list[Tensor]


@torch.no_grad()
def validate(
    network: Callable[[Tensor], Output],
    loader: EvalLoader,
    normalise: DeviceAugment,
    device: torch.device,
    image_size: int,
) -> Accuracy:
    """Evaluate ``network`` on all images of ``loader``. Collective.

    Args:
        image_size: pixels, for blank images.
    """
    counts = torch.zeros(4, dtype=torch.float64, device=device)
    samples: list[Tensor] = []
    batches = iter(loader)
    # Every rank must call the network equally often, because ZeRO-3 gathers parameters inside it.
    # Example: 5 batches on 2 ranks. Both run 3 times; the second rank has no third batch, so it
    # runs a blank image, which is not counted.
    for _ in range(loader.max_batches):
        batch = next(batches, None)
        if batch is None:
            images = torch.zeros((1, image_size, image_size, 3), dtype=torch.uint8)
            labels = torch.zeros(1, dtype=torch.int64)
        else:
            images = batch.images
            labels = batch.labels
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        # Without training augmentation, sample numbers and positions do not matter.
        prepared = normalise(images, labels, labels, labels, 0)
        out = network(prepared.images)
        if batch is not None:
            counts += _count(out.logits[-1].float(), labels)
        if not samples:
            samples = [
                prepared.image01[:SAMPLES].float(),
                *(torch.sigmoid(logits[:SAMPLES].float()) for logits in out.reconstructions),
            ]
    dist.all_reduce(counts)
    total, top1, top5, loss = counts.tolist()
    images_seen = max(total, 1.0)  # an empty split has accuracy 0
    return Accuracy(
        images=int(total),
        top1=top1 / images_seen,
        top5=top5 / images_seen,
        loss=loss / images_seen,
        samples=samples,
    )


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over a batch: (images, correct, correct among the best five, loss)."""
    correct = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    images = torch.full((), float(len(labels)), device=logits.device, dtype=torch.float64)
    loss = functional.cross_entropy(logits, labels).double() * images
    return torch.stack([images, correct[:, 0].sum().double(), correct.any(1).sum().double(), loss])


def image_grid(samples: list[Tensor]) -> Tensor:
    """Inputs above their reconstructions: uint8 (rows * SAMPLES, H, W, 3), row by row.

    Rows of fewer than SAMPLES images are padded with black ones.
    """
    rows = torch.stack(
        [functional.pad(row, (0, 0, 0, 0, 0, 0, 0, SAMPLES - len(row))) for row in samples]
    )
    pixels = (rows.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.flatten(0, 1).permute(0, 2, 3, 1).contiguous().cpu()
