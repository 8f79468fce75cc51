"""What a training stage ran on, in the event of its start: its forecast needs these sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pipeline.monitor.events import Event


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """Sizes of a stage that its job may leave open."""

    device: str  # as torch names it, or cpu
    processes: int
    threads: int  # of a process on a CPU
    micro_batch: int
    classes: int
    images: int  # of the training split

    def scalars(self) -> dict[str, float]:
        """The numbers, as an event holds them."""
        return {name: float(value) for name, value in vars(self).items() if name != "device"}

    @classmethod
    def of(cls, start: Event) -> Self | None:
        """What an event of kind start holds; None if it is of an earlier version."""
        numbers = {name: int(value) for name, value in start.scalars.items()}
        try:
            return cls(device=start.text, **numbers)
        except TypeError:
            return None
