"""Learning-rate schedule of the published recipes: linear warm-up, then cosine, per step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config import job_queries
from pipeline.config.schema import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate of every step, for the real global batch (linear scaling applied)."""

    peak: float
    final: float
    warmup_start: float
    warmup_steps: int
    total_steps: int

    @classmethod
    def of(cls, config: TrainConfig, images: int) -> Schedule:
        """The schedule of a stage on ``images`` training images.

        The rates in ``config`` belong to a batch of ``base_lr_batch`` images and scale linearly.
        Example: base_lr 1e-3 at base_lr_batch 1024 is a peak of 2e-3 at global_batch 2048.
        """
        scale = config.global_batch / config.base_lr_batch
        total_steps = job_queries.steps(config, images)
        warmup_steps = round(config.warmup_epochs * job_queries.steps_per_epoch(config, images))
        return cls(
            peak=config.base_lr * scale,
            final=config.min_lr * scale,
            warmup_start=config.warmup_lr * scale,
            # A run cut short by max_steps still ends at the final rate.
            warmup_steps=min(warmup_steps, total_steps - 1),
            total_steps=total_steps,
        )

    def __call__(self, step: int) -> float:
        """Learning rate of the 0-based ``step``."""
        if step < self.warmup_steps:
            return self.warmup_start + (self.peak - self.warmup_start) * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final + (self.peak - self.final) * cosine
