"""Metrics over a validation split: every image exactly once, for any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from pipeline.data.device import DeviceAugment
from pipeline.data.loader import EvalLoader
from pipeline.evaluate.metrics import METRICS
from pipeline.model import Output

SAMPLES = 8  # inputs that are shown with their reconstructions: one row of the grid


@dataclass(kw_only=True)
class Evaluation:
    """The result over all ranks: number of images, and the mean of every metric by name.

    ``samples``: the first inputs of this rank, then their reconstructions at each position; each
    (up to SAMPLES, 3, H, W) in [0, 1].
    """

    images: int
    metrics: dict[str, float]
    samples: list[Tensor]


@torch.no_grad()
def validate(
    network: Callable[[Tensor], Output],
    loader: EvalLoader,
    normalise: DeviceAugment,
    device: torch.device,
    image_size: int,
) -> Evaluation:
    """Evaluate ``network`` on all images of ``loader``. Collective.

    Args:
        image_size: pixels, for blank images.
    """
    sums = torch.zeros(1 + len(METRICS), dtype=torch.float64, device=device)
    samples: list[Tensor] = []
    batches = iter(loader)
    # Every rank must call the network equally often, because ZeRO-3 gathers parameters inside it.
    # Example: 5 batches on 2 ranks. Both run 3 times; the second rank has no third batch, so it
    # runs a blank image, which is not counted.
    for _ in range(loader.max_batches):
        batch = next(batches, None)
        if batch is None:
            images = torch.zeros((1, image_size, image_size, 3), dtype=torch.uint8, device=device)
            labels = torch.zeros(1, dtype=torch.int64, device=device)
        else:
            batch = batch.to(device)
            images = batch.images
            labels = batch.labels
        # Without training augmentation, sample numbers and positions do not matter.
        prepared = normalise(images, labels, labels, labels, 0)
        out = network(prepared.images)
        if batch is not None:
            sums += _sums(out.logits[-1].float(), labels)
        if not samples:
            samples = [
                prepared.image01()[:SAMPLES].float(),
                *(torch.sigmoid(logits[:SAMPLES].float()) for logits in out.reconstructions),
            ]
    dist.all_reduce(sums)
    total, *metric_sums = sums.tolist()
    images_seen = max(total, 1.0)  # an empty split has accuracy 0
    metrics = {
        name: metric_sum / images_seen
        for name, metric_sum in zip(METRICS, metric_sums, strict=True)
    }
    return Evaluation(images=int(total), metrics=metrics, samples=samples)


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over a batch: number of images, then each metric."""
    images = torch.full((), float(len(labels)), device=logits.device, dtype=torch.float64)
    return torch.stack([images, *(metric(logits, labels).double() for metric in METRICS.values())])


def image_grid(samples: list[Tensor]) -> Tensor:
    """Inputs above their reconstructions: uint8 (rows * SAMPLES, H, W, 3), row by row.

    Rows of fewer than SAMPLES images are padded with black ones.
    """
    rows = torch.stack(
        [functional.pad(row, (0, 0, 0, 0, 0, 0, 0, SAMPLES - len(row))) for row in samples]
    )
    pixels = (rows.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.flatten(0, 1).permute(0, 2, 3, 1).contiguous().cpu()
