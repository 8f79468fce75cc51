"""Which process this is: the coordinates that a launcher passes through the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Coordinates of one training process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    generation: int = 0  # of the group of processes; only the newest may commit results

    @classmethod
    def from_environment(cls) -> World:
        """RANK, WORLD_SIZE, LOCAL_RANK as torchrun sets them; PIPELINE_GENERATION by our own supervisor."""
        get = os.environ.get
        keys = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "PIPELINE_GENERATION": "0"}
        return cls(*(int(get(key, default)) for key, default in keys.items()))

    @property
    def is_main(self) -> bool:
        return self.rank == 0
