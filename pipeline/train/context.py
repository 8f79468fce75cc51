"""What a training stage and its steps work with: values and parts, no control flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import job_queries
from pipeline.config.schema import Job, TrainConfig
from pipeline.data.dataset import PreparedDataset
from pipeline.data.device import DeviceAugment, DeviceBatch
from pipeline.data.loader import Batch
from pipeline.data.rng import uniform
from pipeline.layout import RunDir
from pipeline.model import Network, NetworkSpec, Output
from pipeline.model.fixed_point import ALPHA_LIMIT, remainder_width
from pipeline.monitor.recorder import Recorder
from pipeline.reporting import Log
from pipeline.runtime.dist_env import DistEnv
from pipeline.train.alpha_clamp import AlphaRange, alpha_range, clamp_alpha
from pipeline.train.ema import ema_update
from pipeline.train.engine import DeepSpeedEngine
from pipeline.train.guard import Guard
from pipeline.train.loss import Loss, compound_terms
from pipeline.train.loss_scale import LossScale
from pipeline.train.metrics import Metrics
from pipeline.train.optimizer import set_learning_rate
from pipeline.train.schedule import Schedule
from pipeline.train.self_check import Mismatch, SelfCheck
from pipeline.train.zero_state import ShardedState


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """The settings of a training stage and where its process runs."""

    job: Job
    stage: str
    config: TrainConfig
    run_dir: RunDir
    dist_env: DistEnv
    device: torch.device
    data: PreparedDataset

    @property
    def checkpoints(self) -> Path:
        return self.run_dir.checkpoints(self.stage)

    @property
    def num_classes(self) -> int:
        return len(self.data.classes)

    @property
    def total_steps(self) -> int:
        return job_queries.steps(self.config, len(self.data.split("train")))

    def identity(self, spec: NetworkSpec) -> dict[str, object]:
        """What a checkpoint and the run that resumes from it must agree on."""
        config = self.config
        return {
            "network": spec.architecture,
            "data": self.data.fingerprint,
            # All that decides which image lies at which position of an epoch, with the seed.
            "order": [
                config.order,
                config.window_shards,
                config.repeated_augmentation,
                config.balance,
            ],
            "optimizer": config.optimizer,
            "seed": self.job.seed,
            "global_batch": config.global_batch,
            "total_steps": self.total_steps,
        }


@dataclass(kw_only=True)
class StageLog:
    """Logs to the stage's events, on rank 0 only.

    The recorder opens after the checkpoint is known (it needs the step that training resumes from).
    Messages from before are kept until then.
    """

    is_main: bool
    recorder: Recorder | None = None
    # Where the time since the last logged step went; set by the trainer.
    seconds: Callable[[], dict[str, float]] = dict
    _pending: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, text: str, level: str = "info") -> None:
        if not self.is_main:
            return
        if self.recorder is None:
            self._pending.append((text, level))
        else:
            self.recorder.message(text, level)

    def attach(self, recorder: Recorder) -> None:
        """Log to ``recorder`` from now on, starting with the pending messages."""
        self.recorder = recorder
        for text, level in self._pending:
            recorder.message(text, level)
        self._pending.clear()

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.close(self.seconds())


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """The parts that an optimizer step works with."""

    engine: DeepSpeedEngine
    state: ShardedState
    schedule: Schedule
    device_augment: DeviceAugment
    metrics: Metrics
    self_check: SelfCheck
    guard: Guard
    loss_scale: LossScale
    seed: int
    ema_decay: float
    log_every_steps: int
    device: torch.device
    log: Log

    @property
    def network(self) -> Network:
        return self.engine.module

    def set_learning_rate(self, step: int) -> None:
        set_learning_rate(self.engine.optimizer.param_groups, self.schedule(step))

    def augment(self, batch: Batch) -> DeviceBatch:
        """Augment a batch on the device."""
        return self.device_augment(
            batch.images, batch.labels, batch.views, batch.positions, batch.epoch
        )

    def drop_path_draws(self, batch: Batch) -> Tensor | None:
        """Random numbers for stochastic depth: a function of (seed, epoch, view)."""
        count = self.network.uniforms
        if count == 0:
            return None
        return uniform(self.seed, batch.epoch, batch.views, "drop_path", count)

    def loss(self, output: Output, inputs: DeviceBatch) -> Loss:
        images = inputs.image01() if output.reconstructions else None
        return compound_terms(output, images, inputs.targets)

    def running_statistics(self) -> list[Tensor]:
        """The buffers that a forward pass changes (BatchNorm)."""
        return list(self.state.buffers.values())

    def after_update(self, step: int) -> None:
        """Clamp alpha, update the EMA and average running statistics, after an applied update."""
        # In this order: the EMA must average clamped weights, or its own alpha could get too small.
        clamp_alpha(self.state)
        ema_update(self.state, self.ema_decay, step)
        self.state.average_buffers()

    def log_mismatches(self, mismatches: list[Mismatch], prefix: str) -> None:
        for mismatch in mismatches:
            self.log(f"{prefix}: {mismatch}", "warning")

    def set_remainder_widths(self, alphas: AlphaRange | None = None) -> None:
        """Set the bits that exact columns keep of each remainder until the next call.

        Waits for the device. Collective for exact columns, no effect for others.

        Args:
            alphas: the present range of alpha, if it was read already.
        """
        network = self.network
        if network.spec.activations != "exact":
            return
        # The smaller alpha is, the more bits a remainder needs. Alpha changes in every step, but
        # reading it waits for the device, so it is read once per log interval and its change until
        # the next reading is bounded: Adam moves a weight by about three learning rates per step at
        # most; four are assumed, for other optimizers too. Example: smallest alpha 0.1, peak rate
        # 1e-4, log interval 50. Until the next reading, alpha is at least 0.1 - 4 * 1e-4 * 50 =
        # 0.08. A remainder that outgrows its width is detected all the same, and the step is
        # retried.
        drift = 4 * self.schedule.peak * self.log_every_steps
        network.remainder_widths = [
            [remainder_width(max(smallest - drift, ALPHA_LIMIT / 2)) for smallest in column]
            for column in (alphas or alpha_range(self.state)).smallest
        ]
