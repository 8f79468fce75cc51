"""One optimizer step: micro-batches through the network, gradients, update. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from pipeline.data.device import DeviceAugment
from pipeline.data.loader import Batch, TrainLoader
from pipeline.data.rng import uniform
from pipeline.model.fixed_point import ALPHA_LIMIT, remainder_width
from pipeline.reporting import Log
from pipeline.train.loss import compound_terms
from pipeline.train.metrics import Metrics
from pipeline.train.optimizer import set_rate
from pipeline.train.schedule import Schedule
from pipeline.train.self_check import Finding, SelfCheck
from pipeline.train.zero_state import ShardedState


@dataclass
class TrainingStep:
    """What a step needs."""

    engine: Any
    masters: ShardedState
    schedule: Schedule
    augment: DeviceAugment
    metrics: Metrics
    integrity: SelfCheck
    seed: int
    accumulation: int
    device: torch.device
    log_every_steps: int  # from one reading of alpha to the next
    log: Log
    applied: int = 0  # optimizer steps taken; a step on non-finite gradients is not
    repeated: int = 0  # steps that were done again because their arithmetic was wrong
    skipped: bool = False  # the last one

    def run(self, step: int, loader: TrainLoader) -> None:
        """Optimizer step ``step`` (0-based) on the next ``accumulation`` micro-batches; again, on the same ones, where the
        network finds that it computed wrongly. Raises StageError if that is to be, or stays so."""
        set_rate(self.engine.optimizer.param_groups, self.schedule(step))
        mark, statistics = (
            self.metrics.mark(),
            [buffer.clone() for buffer in self.masters.buffers.values()],
        )
        for attempt in count(1):
            self._attempt(iter(loader))
            if self.engine.was_step_applied():
                self.applied += 1
                self.masters.after_step(step)
                self.skipped = False
                return
            findings = self.integrity.read()
            if not self.integrity.repeats(findings, step + 1, attempt):
                self._say(findings if not self.skipped else [], f"step {step + 1} is left out")
                self.skipped = True
                return
            self._say(findings, f"step {step + 1} is repeated")
            self.repeated += attempt == 1
            self.metrics.rollback(mark)
            for buffer, before in zip(self.masters.buffers.values(), statistics, strict=True):
                buffer.copy_(before)
            self.set_widths()
            loader.rewind(step)

    def _say(self, findings: list[Finding], what: str) -> None:
        for finding in findings:
            self.log(f"{what}: {finding}", "warning")

    def _attempt(self, batches: Iterator[Batch]) -> None:
        network = self.engine.module
        for _ in range(self.accumulation):
            batch = next(batches)
            images, labels, views, positions = (
                tensor.to(self.device, non_blocking=True)
                for tensor in (batch.images, batch.labels, batch.views, batch.positions)
            )
            prepared = self.augment(images, labels, views, positions, batch.epoch)
            draws = (
                uniform(self.seed, batch.epoch, views, "drop_path", network.uniforms)
                if network.uniforms
                else None
            )
            out = self.engine(prepared.images, draws)
            loss = compound_terms(out, prepared.image01, prepared.targets)
            self.engine.backward(loss.total)
            self.integrity.add()
            self.metrics.add(loss, out, prepared.targets, network.consistency.mismatched_elements)
            self.engine.step()

    def set_widths(self) -> None:
        """Bits of the remainders until the next time (reads alpha): Adam moves it by about 3 rates a step at most."""
        network = self.engine.module
        if network.spec.activations == "exact":
            drift = 4 * self.schedule.peak * self.log_every_steps
            network.remainder_widths = [
                [remainder_width(max(smallest - drift, ALPHA_LIMIT / 2)) for smallest in column]
                for column in self.masters.smallest_alpha()
            ]
