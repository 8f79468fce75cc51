"""Samples that were replaced because they cannot be read, over all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pipeline.data.loader import TrainLoader


class ReplacedSamples:
    """Their number since the stage began. ``before``: that of the checkpoint which training goes on from."""

    def __init__(self, loader: TrainLoader, before: int, device: torch.device) -> None:
        self._loader, self._before, self._device = loader, before, device
        self._total = self._told = before

    def count(self) -> int:
        """Collective (synchronises): how many there are by now."""
        mine = torch.tensor(self._loader.replaced_samples, device=self._device)
        dist.all_reduce(mine)
        self._total = self._before + int(mine)
        return self._total

    def new_reasons(self) -> list[str]:
        """Collective: file, row and cause of a few of each rank's, of those counted since this was last asked."""
        if self._total == self._told:
            return []
        self._told = self._total
        reasons: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(reasons, self._loader.new_reasons())
        return list(dict.fromkeys(reason for rank in reasons for reason in rank))
