"""One optimizer step: forward and backward over the micro-batches, then the update.

Nothing on the normal path waits for the device. Only after the engine has refused an update
(non-finite gradients) is the reason read back: a step that failed its self-check is retried on the
same images, any other is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.data.device import DeviceBatch
from pipeline.data.loader import Batch, TrainLoader
from pipeline.train.context import StepContext
from pipeline.train.engine import warnings_off
from pipeline.train.loss_scale import LossScaleState
from pipeline.train.metrics import MetricsMark
from pipeline.train.self_check import Mismatch
from pipeline.train.step_times import BACKWARD, DATA, FORWARD, UPDATE, StepTimes


@dataclass(frozen=True)
class StepSnapshot:
    """What changes even if the update is refused: metrics, BatchNorm statistics, the loss scale."""

    metrics: MetricsMark
    loss_scale: LossScaleState
    running_statistics: list[Tensor]


@dataclass(kw_only=True)
class TrainingStep:
    """Runs optimizer steps and counts how they ended."""

    context: StepContext
    accumulation: int  # micro-batches per optimizer step
    applied_steps: int = 0
    retried_steps: int = 0
    last_step_skipped: bool = False
    last_step_spiked: bool = False
    times: StepTimes = field(init=False)
    # Called once, with the next micro-batch as the network receives it.
    on_next_batch: Callable[[Batch, DeviceBatch], None] | None = None

    def __post_init__(self) -> None:
        self.times = StepTimes(self.context.device)

    def run(self, step: int, loader: TrainLoader) -> None:
        """Run optimizer step ``step`` (0-based) on the next ``accumulation`` micro-batches.

        Raises:
            StageError: the self-check failed, and the job says to stop or all retries are used up.
        """
        self.context.set_learning_rate(step)
        snapshot = self._snapshot()
        attempt = 1
        while not self._try(loader):
            # The engine refused the update. Three causes:
            #  - the guard calls the step a spike: skip;
            #  - the self-check found wrong arithmetic, usually of the hardware: the same images may
            #    succeed a second time, so retry;
            #  - the loss itself overflowed: the same images would overflow again, so skip.
            mismatches = self.context.self_check.read()
            # A step that is not applied leaves no trace in the running statistics either: one
            # overflow would spoil every evaluation that follows.
            self._restore_statistics(snapshot)
            if not self.context.self_check.should_retry(mismatches, step, attempt):
                self._skip(step, mismatches, snapshot)
                return
            if attempt == 1:  # count steps, not attempts
                self.retried_steps += 1
            self.context.log_mismatches(mismatches, f"step {step + 1}: retrying")
            self.context.metrics.rollback(snapshot.metrics)
            self.context.loss_scale.restore(snapshot.loss_scale)
            # The failure may have been a remainder that outgrew its width: measure again.
            self.context.set_remainder_widths()
            loader.rewind(step + self.context.guard.state.shift)
            attempt += 1
        self.applied_steps += 1
        self.context.after_update(step)
        self._warn_of_spike(step)
        self.context.guard.applied(step)
        self.last_step_skipped = False

    def rehearse(self, batch: Batch) -> None:
        """Compute a micro-batch that leaves no trace: the engine refuses its update."""
        context = self.context
        snapshot = self._snapshot()
        context.guard.begin()
        context.engine.micro_steps = self.accumulation - 1  # this one ends a step
        batch = batch.to(context.device)
        inputs = context.augment(batch)
        output = context.engine(inputs.images, context.drop_path_draws(batch))
        # Gradients that are not finite are reduced like others, and then discarded on all ranks.
        context.engine.backward(context.loss(output, inputs).total * torch.inf)
        with warnings_off():
            context.engine.step()
        self._restore_statistics(snapshot)
        context.loss_scale.restore(snapshot.loss_scale)

    def _try(self, loader: TrainLoader) -> bool:
        """Run all micro-batches once. True if the engine applied the update."""
        self.context.guard.begin()
        batches: Iterator[Batch] = iter(loader)
        for _ in range(self.accumulation):
            with self.times.phase(DATA):
                batch = next(batches)
            self._micro_batch(batch)
        return self.context.engine.was_step_applied()

    def _micro_batch(self, batch: Batch) -> None:
        context = self.context
        with self.times.phase(FORWARD):
            batch = batch.to(context.device)
            inputs = context.augment(batch)
            if self.on_next_batch is not None:
                self.on_next_batch(batch, inputs)
                self.on_next_batch = None
            output = context.engine(inputs.images, context.drop_path_draws(batch))
            loss = context.loss(output, inputs)
            context.guard.add(loss.total)
        with self.times.phase(BACKWARD):
            context.engine.backward(loss.total)
        # Between the backward pass and the next forward pass, which starts a new record.
        mismatched = context.self_check.add()
        context.metrics.add(loss, output, inputs.targets, mismatched)
        with self.times.phase(UPDATE):
            context.engine.step()  # updates the weights after the last micro-batch only

    def _skip(self, step: int, mismatches: list[Mismatch], snapshot: StepSnapshot) -> None:
        context = self.context
        reason = context.guard.reason
        if reason or mismatches:
            # Neither says anything about the scale of the loss.
            context.loss_scale.restore(snapshot.loss_scale)
        else:
            loss_is_finite = context.guard.loss_is_finite()
            if loss_is_finite and context.loss_scale.explains_overflow:
                return  # fp16 looks for the largest scale that works: no bad step
            reason = "the gradients are" if loss_is_finite else "the loss is"
            reason += " not finite"
        context.guard.skipped(step, reason or str(mismatches[0]))
        # In a run of bad steps, log the first one only: the metric counts them.
        if not self.last_step_skipped:
            context.log_mismatches(mismatches, f"step {step + 1}: skipped")
            if not mismatches:
                context.log(f"step {step + 1}: skipped: {reason}", "warning")
        self.last_step_skipped = True

    def _warn_of_spike(self, step: int) -> None:
        """Log a spike that was trained on, under ``on_spike: warn``; the first one of a row."""
        guard = self.context.guard
        if guard.reason and not self.last_step_spiked:
            self.context.log(f"step {step + 1}: {guard.reason}", "warning")
        self.last_step_spiked = bool(guard.reason)

    def _snapshot(self) -> StepSnapshot:
        statistics = [buffer.clone() for buffer in self.context.running_statistics()]
        return StepSnapshot(
            self.context.metrics.mark(), self.context.loss_scale.state(), statistics
        )

    @torch.no_grad()
    def _restore_statistics(self, snapshot: StepSnapshot) -> None:
        current = self.context.running_statistics()
        for buffer, before in zip(current, snapshot.running_statistics, strict=True):
            buffer.copy_(before)
