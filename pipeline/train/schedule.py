"""Learning rate: linear warm-up, then cosine, both by optimizer step (as the published recipes)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config import job_queries
from pipeline.config.schema import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Learning rate of every step, for the real global batch (linear scaling applied)."""

    peak: float
    final: float
    warmup_start: float
    warmup_steps: int
    total_steps: int

    @classmethod
    def of(cls, config: TrainConfig, images: int) -> Schedule:
        """For a training split of ``images``. ``config`` states rates for ``base_lr_batch`` images a step; they scale linearly
        with ``global_batch``."""
        scale = config.global_batch / config.base_lr_batch
        total = job_queries.steps(config, images)
        warmup = min(
            round(config.warmup_epochs * job_queries.steps_per_epoch(config, images)), total - 1
        )
        return cls(
            config.base_lr * scale, config.min_lr * scale, config.warmup_lr * scale, warmup, total
        )

    def __call__(self, step: int) -> float:
        """Rate of the 0-based ``step``."""
        if step < self.warmup_steps:
            return self.warmup_start + (self.peak - self.warmup_start) * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.final + (self.peak - self.final) * 0.5 * (
            1 + math.cos(math.pi * min(1.0, progress))
        )
