"""Which process this is: the coordinates that a launcher passes through the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

_COORDINATES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@dataclass(frozen=True)
class DistEnv:
    """Coordinates of one training process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    generation: int | None = (
        None  # of a supervised group of processes: only the newest may commit results
    )

    @classmethod
    def from_environment(cls) -> DistEnv:
        """RANK, WORLD_SIZE, LOCAL_RANK as torchrun sets them; PIPELINE_GENERATION by our own supervisor."""
        rank, size, local_rank = (
            int(os.environ.get(key, default)) for key, default in _COORDINATES.items()
        )
        generation = os.environ.get("PIPELINE_GENERATION")
        return cls(rank, size, local_rank, None if generation is None else int(generation))

    @property
    def is_main(self) -> bool:
        return self.rank == 0
