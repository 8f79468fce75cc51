"""Metrics over a validation split: every image exactly once, for any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.device import DeviceAugment
from pipeline.data.loader import EvalLoader
from pipeline.evaluate.metrics import Metric, metrics_of
from pipeline.evaluate.pictures import Samples, take_samples
from pipeline.model import Output


@dataclass(kw_only=True)
class Evaluation:
    """The result over all ranks: number of images, and the mean of every metric by name.

    ``samples``: the first images of this rank; None if it has no image.
    """

    images: int
    metrics: dict[str, float]
    samples: Samples | None


@torch.no_grad()
def validate(
    network: Callable[[Tensor], Output],
    loader: EvalLoader,
    normalise: DeviceAugment,
    device: torch.device,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate ``network`` on all images of ``loader``. Collective.

    ``on_batch`` is called after each batch.
    """
    reported = metrics_of(normalise.num_classes)
    sums = torch.zeros(1 + len(reported), dtype=torch.float64, device=device)
    samples: Samples | None = None
    batches = iter(loader)
    # Every rank must call the network equally often, because ZeRO-3 gathers parameters inside it.
    # Example: 5 batches on 2 ranks. Both run 3 times; the second rank has no third batch, so it
    # runs a blank image, which is not counted.
    for _ in range(loader.max_batches):
        batch = next(batches, None)
        if batch is None:
            size = loader.image_size
            images = torch.zeros((1, size, size, 3), dtype=torch.uint8, device=device)
            labels = torch.zeros(1, dtype=torch.int64, device=device)
        else:
            batch = batch.to(device)
            images = batch.images
            labels = batch.labels
        # Without training augmentation, sample numbers and positions do not matter.
        prepared = normalise(images, labels, labels, labels, 0)
        out = network(prepared.images)
        if batch is not None:
            sums += _sums(reported, out.logits[-1].float(), labels)
            samples = samples or take_samples(batch, out)
        on_batch()
    dist.all_reduce(sums)
    total, *metric_sums = sums.tolist()
    images_seen = max(total, 1.0)  # an empty split has accuracy 0
    metrics = {
        name: metric_sum / images_seen
        for name, metric_sum in zip(reported, metric_sums, strict=True)
    }
    return Evaluation(images=int(total), metrics=metrics, samples=samples)


def _sums(reported: dict[str, Metric], logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over a batch: number of images, then each metric."""
    images = torch.full((), float(len(labels)), device=logits.device, dtype=torch.float64)
    return torch.stack([images, *(metric(logits, labels).double() for metric in reported.values())])
