"""Counting right answers over a validation split: every image once, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.device import DeviceAugment
from pipeline.data.loader import EvalLoader
from pipeline.model import Output
from pipeline.train.loss import cross_entropy


@dataclass
class Accuracy:
    """Result over all ranks. ``samples``: a few inputs and their reconstructions, on every rank its own."""

    images: int
    top1: float
    top5: float
    loss: float
    samples: list[Tensor]

    def scalars(self) -> dict[str, float]:
        return {"accuracy/top1": self.top1, "accuracy/top5": self.top5, "loss/validation": self.loss}


@torch.no_grad()
def validate(
    network: Callable[[Tensor], Output], loader: EvalLoader, normalise: DeviceAugment, device: torch.device, forwards: int
) -> Accuracy:
    """
    Args:
        forwards: calls of ``network`` that every rank makes, so that collectives inside it (ZeRO-3) match: a rank that
            runs out of images goes on with a blank one, which is not counted.
    """
    counts = torch.zeros(4, dtype=torch.float64, device=device)
    samples: list[Tensor] = []
    batches = iter(loader)
    image_shape: tuple[int, ...] = (1, loader.image_size, loader.image_size, 3)
    for _ in range(forwards):
        batch = next(batches, None)
        images = torch.zeros(image_shape, dtype=torch.uint8) if batch is None else batch.images
        labels = torch.zeros(1, dtype=torch.int64) if batch is None else batch.labels
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        prepared = normalise(images, labels, labels, labels, 0)
        out = network(prepared.images)
        if batch is not None:
            counts += _count(out.logits[-1].float(), labels)
        if not samples:
            samples = [prepared.image01[:8].float(), *(torch.sigmoid(r[:8].float()) for r in out.reconstructions)]
    dist.all_reduce(counts)
    images_seen, top1, top5, loss = counts.tolist()
    seen = max(images_seen, 1.0)
    return Accuracy(int(images_seen), top1 / seen, top5 / seen, loss / seen, samples)


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """(images, right at first, right among five, summed loss)."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    total = torch.full((), float(len(labels)), device=logits.device, dtype=torch.float64)
    loss = cross_entropy(logits, labels).double() * total
    return torch.stack([total, ranked[:, 0].sum().double(), ranked.any(1).sum().double(), loss])


def picture_rows(samples: list[Tensor]) -> Tensor:
    """Inputs over their reconstructions: uint8 (rows * n, H, W, 3), row by row."""
    rows = [(row.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu() for row in samples]
    return torch.cat(rows)
