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
        return cls(
            int(get("RANK", "0")), int(get("WORLD_SIZE", "1")), int(get("LOCAL_RANK", "0")), int(get("PIPELINE_GENERATION", "0"))
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0
