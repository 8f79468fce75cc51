"""Rank, world size and local rank of this process, as its launcher passes them."""

from __future__ import annotations

import os
from dataclasses import dataclass

GENERATION = "PIPELINE_GENERATION"
DEVICE = "PIPELINE_DEVICE"


@dataclass(frozen=True, kw_only=True)
class DistEnv:
    """Coordinates of one training process.

    Example: the second of two processes on one machine is
    ``DistEnv(rank=1, size=2, local_rank=1, local_size=2)``.
    """

    rank: int = 0
    size: int = 1  # processes in total
    local_rank: int = 0  # among those of this machine
    local_size: int = 1  # processes on this machine
    # Number of this process group. A supervisor starts a new group after a failure and counts up;
    # only the newest group may commit results. None without a supervisor.
    generation: int | None = None
    device: int | None = None  # index of the GPU, where Ray chose it; default: the local rank

    @classmethod
    def from_environment(cls) -> DistEnv:
        """Read torchrun's RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, and our own variables.

        A variable that is not set takes its default: a single process without a supervisor.
        """
        generation = os.environ.get(GENERATION)
        device = os.environ.get(DEVICE)
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            size=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            generation=None if generation is None else int(generation),
            device=None if device is None else int(device),
        )

    @property
    def device_index(self) -> int:
        """The GPU of this process, among those that it sees."""
        return self.local_rank if self.device is None else self.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which logs and writes the results."""
        return self.rank == 0
