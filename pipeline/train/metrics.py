"""Training metrics: summed on the device, read back only when they are logged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.model import Output
from pipeline.monitor import tags
from pipeline.train.loss import Loss


def metric_names(positions: int, decoders: int) -> list[str]:
    """Tags of the metrics vector's entries, in order.

    Args:
        positions: supervised positions, each with a classifier.
        decoders: how many of them have a reconstruction decoder.
    """
    return [
        tags.LOSS,
        *(tags.classification_loss(i) for i in range(positions)),
        *(tags.reconstruction_loss(i) for i in range(decoders)),
        tags.TRAIN_TOP1,
        tags.MISMATCHED_ELEMENTS,
    ]


@dataclass(frozen=True)
class MetricSums:
    """Metrics in a checkpoint: sums averaged over the ranks, of ``count`` micro-batches each."""

    sums: list[float]
    count: int


@dataclass(frozen=True)
class MetricsMark:
    """A state of the metrics to roll back to."""

    sums: Tensor
    count: int


class Metrics:
    """Sums over the micro-batches since the last log, one vector on the device.

    Every entry is logged as a mean, except the last: mismatched elements are counted.
    """

    def __init__(self, positions: int, decoders: int, device: torch.device) -> None:
        self.names = metric_names(positions, decoders)
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.count = 0

    def mark(self) -> MetricsMark:
        """The current state, for ``rollback``."""
        return MetricsMark(self.sums.clone(), self.count)

    def rollback(self, mark: MetricsMark) -> None:
        """Discard what was added since ``mark``, except the count of mismatched elements."""
        # A retried step must not count twice, but its mismatch must stay visible.
        self.count = mark.count
        self.sums[:-1] = mark.sums[:-1]

    @torch.no_grad()
    def add(self, loss: Loss, out: Output, targets: Tensor, mismatched: Tensor) -> None:
        """Add one micro-batch. Does not wait for the device."""
        correct = (out.logits[-1].argmax(1) == targets.argmax(1)).float().mean()
        entries = [loss.total, *loss.classification, *loss.reconstruction, correct, mismatched]
        # float64: a sum over many micro-batches must not lose the small terms.
        self.sums += torch.stack([entry.detach().double() for entry in entries])
        self.count += 1

    def read(self) -> dict[str, float]:
        """Means over all ranks since the last call; resets the sums.

        Collective; waits for the device.
        """
        sums = self.sums.clone()
        dist.all_reduce(sums)
        values: list[float] = sums.tolist()
        micro_batches = max(self.count, 1) * dist.get_world_size()
        self.sums.zero_()
        self.count = 0
        means = {
            name: value / micro_batches for name, value in zip(self.names, values, strict=True)
        }
        means[tags.MISMATCHED_ELEMENTS] = values[-1]  # a count, not a mean
        return means

    def state(self) -> MetricSums:
        """The sums for a checkpoint. Collective; waits for the device.

        With them, a resumed run logs the same means as an uninterrupted one.
        """
        sums = self.sums.clone()
        dist.all_reduce(sums)
        # Averaged over the ranks: the means are right after a resume on any number of ranks.
        means = [value / dist.get_world_size() for value in sums.tolist()]
        return MetricSums(means, self.count)

    def restore(self, saved: MetricSums) -> None:
        """Continue from the sums of a checkpoint."""
        self.sums.copy_(torch.tensor(saved.sums, dtype=torch.float64))
        self.count = saved.count
