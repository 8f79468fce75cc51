"""Counting right answers over a validation split: every image once, whatever the number of processes."""

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


@dataclass
class Accuracy:
    """Result over all ranks. ``samples``: a few inputs and their reconstructions, on every rank its own."""

    images: int
    top1: float
    top5: float
    loss: float
    samples: list[Tensor]

    def scalars(self) -> dict[str, float]:
        return {
            "accuracy/top1": self.top1,
            "accuracy/top5": self.top5,
            "loss/validation": self.loss,
        }


@torch.no_grad()
def validate(
    network: Callable[[Tensor], Output],
    loader: EvalLoader,
    normalise: DeviceAugment,
    device: torch.device,
    image_size: int,
) -> Accuracy:
    """Collective. Every rank calls ``network`` equally often, so that collectives inside it (ZeRO-3) match: a rank that has
    no more images takes a blank one of ``image_size`` pixels, which is not counted."""
    counts = torch.zeros(4, dtype=torch.float64, device=device)
    samples: list[Tensor] = []
    batches = iter(loader)
    for _ in range(loader.max_batches):
        batch = next(batches, None)
        images = (
            torch.zeros((1, image_size, image_size, 3), dtype=torch.uint8)
            if batch is None
            else batch.images
        )
        labels = torch.zeros(1, dtype=torch.int64) if batch is None else batch.labels
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        prepared = normalise(images, labels, labels, labels, 0)
        out = network(prepared.images)
        if batch is not None:
            counts += _count(out.logits[-1].float(), labels)
        if not samples:
            samples = [
                prepared.image01[:SAMPLES].float(),
                *(torch.sigmoid(r[:SAMPLES].float()) for r in out.reconstructions),
            ]
    dist.all_reduce(counts)
    images_seen, top1, top5, loss = counts.tolist()
    seen = max(images_seen, 1.0)
    return Accuracy(int(images_seen), top1 / seen, top5 / seen, loss / seen, samples)


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """(images, right at first, right among five, summed loss)."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    total = torch.full((), float(len(labels)), device=logits.device, dtype=torch.float64)
    loss = functional.cross_entropy(logits, labels).double() * total
    return torch.stack([total, ranked[:, 0].sum().double(), ranked.any(1).sum().double(), loss])


def picture_rows(samples: list[Tensor]) -> Tensor:
    """Inputs over their reconstructions: uint8 (rows * SAMPLES, H, W, 3), row by row, filled up with black."""
    rows = torch.stack(
        [functional.pad(row, (0, 0, 0, 0, 0, 0, 0, SAMPLES - len(row))) for row in samples]
    )
    return (
        (rows.clamp(0, 1) * 255)
        .round()
        .to(torch.uint8)
        .flatten(0, 1)
        .permute(0, 2, 3, 1)
        .contiguous()
        .cpu()
    )
