"""The metrics of a training stage at a logged step. Between two logs nothing is read back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from pipeline.monitor import tags
from pipeline.train.alpha_clamp import AlphaRange
from pipeline.train.column_norms import ColumnNorms
from pipeline.train.context import StageContext, StageLog
from pipeline.train.memory_metrics import MemoryMetrics
from pipeline.train.replaced_samples import ReplacedSamples
from pipeline.train.step import TrainingStep
from pipeline.train.step_times import TimesLog
from pipeline.train.stragglers import Stragglers
from pipeline.train.throughput import Throughput
from pipeline.train.utilisation import utilisation


@dataclass(kw_only=True)
class StepMetrics:
    """Reads the metrics of the steps since the last log.

    ``logged_step``: steps done at the last log.
    """

    context: StageContext
    step: TrainingStep
    replaced: ReplacedSamples
    throughput: Throughput
    log: StageLog
    times_log: TimesLog
    logged_step: int
    norms: ColumnNorms = field(init=False)
    memory: MemoryMetrics = field(init=False)
    stragglers: Stragglers = field(init=False)

    def __post_init__(self) -> None:
        state = self.step.context.state
        self.norms = ColumnNorms(state)
        self.memory = MemoryMetrics(state, self.context.device)
        self.stragglers = Stragglers(self.context.job.cluster.straggler_factor, self.log)

    def read(self, done: int, alphas: AlphaRange, seconds: dict[str, float]) -> dict[str, float]:
        """The metrics by tag, after step ``done``. Collective; waits for the device.

        Args:
            alphas: the present range of alpha.
            seconds: where the time since the last log went.
        """
        context = self.step.context
        scalars = context.metrics.read()
        # Mismatches that are still here belong to steps that were trained: under on_mismatch: warn.
        max_abs, mismatches = context.self_check.summary(scalars[tags.MISMATCHED_ELEMENTS] > 0)
        since = f"since step {self.logged_step + 1}"
        context.log_mismatches(mismatches, f"mismatch ignored {since} (on_mismatch: warn)")
        replaced_samples = self.replaced.count()
        for reason in self.replaced.new_reasons():
            self.log(f"sample replaced {since} (on_bad_sample: replace): {reason}", "warning")
        scalars |= {
            **self._learning_rates(done),
            tags.SKIPPED_STEPS: float(done - self.step.applied_steps),
            tags.RETRIED_STEPS: float(self.step.retried_steps),
            tags.REPLACED_SAMPLES: float(replaced_samples),
            **self._columns(max_abs, alphas),
            **self.norms.read(),
            **self.memory.scalars(),
            **self._speed(done, seconds),
        }
        grad_norm = context.engine.get_global_grad_norm()
        if grad_norm is not None:
            scalars[tags.GRAD_NORM] = float(grad_norm)
        self.logged_step = done
        return scalars

    def _learning_rates(self, done: int) -> dict[str, float]:
        """The rate of the schedule and, with layer decay, that of each group of parameters."""
        rate = self.step.context.schedule(done - 1)
        rates = {tags.LEARNING_RATE: rate}
        groups = self.step.context.engine.optimizer.param_groups
        factors = sorted({group["lr_scale"] for group in groups})
        if len(factors) > 1:
            rates |= {tags.group_rate(i): rate * factor for i, factor in enumerate(factors)}
        return rates

    def _columns(self, max_abs: list[float], alphas: AlphaRange) -> dict[str, float]:
        """Range of the stream, as a whole and in bits left per column; range of |alpha|."""
        # NaN wins: a maximum of Python's would lose it.
        scalars = {tags.MAX_ABS: float(np.max(max_abs)) if max_abs else 0.0}
        limit = self.step.context.network.consistency.limit
        for t, largest in enumerate(max_abs):
            # Example: 512 of 8192 leave log2(8192 / 512) = 4 bits; at 0 the stream is saturated.
            used = min(max(largest, 1.0 / limit), limit)
            scalars[tags.headroom(t)] = math.log2(limit / used)
        for t, (smallest, largest_of) in enumerate(
            zip(alphas.smallest, alphas.largest, strict=True)
        ):
            scalars[tags.smallest_alpha(t)] = min(smallest)
            scalars[tags.largest_alpha(t)] = max(largest_of)
        return scalars

    def _speed(self, done: int, seconds: dict[str, float]) -> dict[str, float]:
        times = self.step.times.take()
        self.times_log.write(done, seconds | times)
        rates = self.throughput.rates(done, seconds)
        network = self.step.context.network
        return {
            **rates,
            **utilisation(self.context, network, rates[tags.IMAGES_PER_S]),
            **self.stragglers.compare(times),
        }
