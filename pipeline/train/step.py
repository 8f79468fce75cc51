"""One optimizer step: micro-batches through the network, gradients, update. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.data.device import DeviceAugment
from pipeline.data.loader import Batch
from pipeline.data.randomness import uniform
from pipeline.train.loss import compound_terms
from pipeline.train.masters import Masters
from pipeline.train.metrics import Metrics
from pipeline.train.optim import set_rate
from pipeline.train.schedule import Schedule


@dataclass
class Stepper:
    """What a step needs."""

    engine: Any
    masters: Masters
    schedule: Schedule
    augment: DeviceAugment
    metrics: Metrics
    seed: int
    accumulation: int
    device: torch.device
    applied: int = 0  # optimizer steps taken; a step on non-finite gradients is not

    def run(self, step: int, batches: Iterator[Batch]) -> None:
        """Optimizer step ``step`` (0-based) on the next ``accumulation`` micro-batches."""
        network = self.engine.module
        set_rate(self.engine.optimizer.param_groups, self.schedule(step))
        for _ in range(self.accumulation):
            batch = next(batches)
            images, labels, samples, positions = (
                tensor.to(self.device, non_blocking=True)
                for tensor in (batch.images, batch.labels, batch.samples, batch.positions)
            )
            prepared = self.augment(images, labels, samples, positions, batch.epoch)
            draws = uniform(self.seed, batch.epoch, samples, "drop_path", network.uniforms) if network.uniforms else None
            out = self.engine(prepared.images, draws)
            loss = compound_terms(out, prepared.image01, prepared.targets)
            self.engine.backward(loss.total)
            self.metrics.add(loss, out, prepared.targets, network.health.mismatched_elements)
            self.engine.step()
        if self.engine.was_step_applied():
            self.applied += 1
            self.masters.after_step(step)
