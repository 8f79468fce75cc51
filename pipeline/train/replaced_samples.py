"""Samples that the loader replaced because they cannot be read, over all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pipeline.data.loader import TrainLoader


class ReplacedSamples:
    """Their number since the stage began, and why they were replaced.

    Args:
        resumed: the number in the checkpoint that training resumes from, 0 without one.
    """

    def __init__(self, loader: TrainLoader, resumed: int, device: torch.device) -> None:
        self._loader = loader
        self._resumed = resumed
        self._device = device
        self._total = resumed
        self._reported = resumed

    def count(self) -> int:
        """The number so far. Collective; waits for the device."""
        # The loader of each rank counts from the start of this process only.
        count = torch.tensor(self._loader.replaced_samples, device=self._device)
        dist.all_reduce(count)
        self._total = self._resumed + int(count)
        return self._total

    def new_reasons(self) -> list[str]:
        """File, row and cause of some samples replaced since the last call. Collective."""
        # The total is the same on every rank, so all ranks skip the exchange or none does.
        if self._total == self._reported:
            return []
        self._reported = self._total
        reasons: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(reasons, self._loader.new_reasons())
        return list(dict.fromkeys(reason for rank in reasons for reason in rank))
