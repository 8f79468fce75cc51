"""What a reversible column network looks like, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Four = tuple[int, int, int, int]
Activations = Literal["stored", "exact"]


@dataclass(frozen=True)
class NetworkSpec:
    """Architecture of one RevCol (Cai et al., ICLR 2023, section 3).

    ``channels`` and ``depths`` are those of the four levels, finest (stride 4) first. ``supervised`` puts a classifier on
    four columns and a reconstruction decoder on the first three of them; otherwise one classifier reads the last column.
    """

    channels: Four
    depths: Four
    columns: int
    num_classes: int
    huge: bool = False
    supervised: bool = False
    block: str = "convnext"
    activations: Activations = "exact"
    drop_path: float = 0.0
    head_init_scale: float = 1.0

    def __post_init__(self) -> None:
        if len(self.channels) != 4 or len(self.depths) != 4:
            raise ValueError(f"channels and depths need four levels each, got {self.channels} and {self.depths}")
        if self.supervised and self.columns < 4:
            raise ValueError(f"intermediate supervision needs at least 4 columns, got {self.columns}")

    @property
    def supervised_columns(self) -> tuple[int, ...]:
        """Columns (0-based) whose level 3 is read by a classifier, the last one being the model's."""
        if not self.supervised:
            return (self.columns - 1,)
        interval = self.columns // 4
        return tuple(interval * (i + 1) - 1 for i in range(4))

    @property
    def drop_rates(self) -> list[float]:
        """Stochastic-depth rate of each block of a column, the same in every column: linear from 0 to ``drop_path``."""
        blocks = sum(self.depths)
        return [self.drop_path * i / max(blocks - 1, 1) for i in range(blocks)]
