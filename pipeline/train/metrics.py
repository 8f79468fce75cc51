"""Training metrics summed on the device, read only when they are logged."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.model import Output
from pipeline.train.loss import Loss


def names(positions: int, decoders: int) -> list[str]:
    """Names of the entries of a metrics vector."""
    return [
        "loss/total",
        *(f"loss/position_{i}/classification" for i in range(positions)),
        *(f"loss/position_{i}/reconstruction" for i in range(decoders)),
        "accuracy/train_top1",
        "reversible/mismatched_elements",
    ]


class Metrics:
    """Sums over micro-batches since the last reading. Mean of every entry, but the count of mismatched elements."""

    def __init__(self, positions: int, decoders: int, device: torch.device) -> None:
        self.names = names(positions, decoders)
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.count = 0

    def mark(self) -> tuple[Tensor, int]:
        """For ``rollback``."""
        return self.sums.clone(), self.count

    def rollback(self, mark: tuple[Tensor, int]) -> None:
        """Forget what was added since ``mark``, but not the mismatched elements."""
        sums, self.count = mark
        self.sums[:-1] = sums[:-1]

    @torch.no_grad()
    def add(self, loss: Loss, out: Output, targets: Tensor, mismatched: Tensor) -> None:
        """One micro-batch; nothing is read from the device."""
        correct = (out.logits[-1].argmax(1) == targets.argmax(1)).float().mean()
        entries = [loss.total, *loss.classification, *loss.reconstruction, correct, mismatched]
        self.sums += torch.stack([entry.detach().double() for entry in entries])
        self.count += 1

    def read(self) -> dict[str, float]:
        """Means over all ranks since the last reading (synchronises); starts anew."""
        sums, count = self.sums.clone(), max(self.count, 1)
        dist.all_reduce(sums)
        values: list[float] = sums.tolist()
        self.sums.zero_()
        self.count = 0
        result = {
            name: value / (count * dist.get_world_size())
            for name, value in zip(self.names, values, strict=True)
        }
        result[self.names[-1]] = values[-1]
        return result

    def state(self) -> dict[str, object]:
        """For the checkpoint: a resumed run logs the same means as an undisturbed one (synchronises)."""
        sums = self.sums.clone()
        dist.all_reduce(sums)
        return {
            "sums": [value / dist.get_world_size() for value in sums.tolist()],
            "count": self.count,
        }

    def restore(self, sums: list[float], count: int) -> None:
        self.sums.copy_(torch.tensor(sums, dtype=torch.float64))
        self.count = count
