"""Compares the forecast of a finished run with what it measured: the work behind plan --check."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from pipeline.checkpoint.manifest import list_checkpoints
from pipeline.command import command
from pipeline.config.devices import DEVICES, device_named
from pipeline.config.job_queries import TRAINING
from pipeline.config.memory import GIB
from pipeline.config.memory_plan import StagePlan
from pipeline.config.schema import Job
from pipeline.config.stage_settings import settings_of
from pipeline.errors import ConfigError
from pipeline.layout import RunDir
from pipeline.monitor import tags
from pipeline.monitor.events import Event, read_events
from pipeline.monitor.trained_on import TrainedOn
from pipeline.plan.forecast import Forecast, as_written
from pipeline.plan.report import amount, on_threads

STEP = "step"


@dataclass(frozen=True)
class Comparison:
    """One quantity of a stage."""

    name: str
    forecast: float
    measured: float

    @property
    def error(self) -> float:
        """Of the forecast, as a share of the measured value."""
        return self.forecast / self.measured - 1

    def in_words(self, value: float) -> str:
        """Seconds or bytes."""
        return f"{value:.4g} s" if self.name == STEP else amount(value)


def check_text(run_dir: RunDir) -> str:
    """A table of all training stages of a run.

    Raises:
        ConfigError: no stage of the run has trained, or its settings were not recorded.
        StageError: the record is damaged.
    """
    lines = [f"{'stage':<10} {'':<18} {'forecast':>12} {'measured':>12} {'error':>8}"]
    for stage in TRAINING:
        for row in compare(run_dir, stage):
            forecast, measured = (row.in_words(value) for value in (row.forecast, row.measured))
            lines.append(
                f"{stage:<10} {row.name:<18} {forecast:>12} {measured:>12} {row.error:>+8.1%}"
            )
    if len(lines) == 1:
        raise ConfigError(
            "no stage of this run has measured anything",
            place=str(run_dir.path),
            remedy=f"check a run that has trained: {command('runs')}",
        )
    return "\n".join(lines) + "\n"


def compare(run_dir: RunDir, stage: str) -> list[Comparison]:
    """Peak memory, bytes of a checkpoint and time of a step; what was not measured is left out."""
    events = read_events(run_dir.events(stage))
    starts = [TrainedOn.of(event) for event in events if event.kind == "start"]
    if not starts or starts[-1] is None:
        return []
    ran_on = starts[-1]
    settings = settings_of(run_dir, stage)
    if settings is None:
        raise ConfigError(
            f"the settings of {stage} are not recorded",
            place=str(run_dir.started_with(stage)),
            remedy="check a run of the command run: a stage that train ran alone has no record",
        )
    expected = _forecast(Job.model_validate(settings), stage, ran_on)
    return [
        Comparison(name, forecast, measured)
        for name, forecast, measured in (
            ("peak memory", expected.needed, _peak(events)),
            ("checkpoint", expected.checkpoint_bytes, _checkpoint(run_dir, stage)),
            (STEP, expected.time.seconds, _step(events, expected)),
        )
        if measured
    ]


def _forecast(job: Job, stage: str, ran_on: TrainedOn) -> Forecast:
    train = getattr(job.stages, stage).model_copy(update={"micro_batch": ran_on.micro_batch})
    device = device_named(ran_on.device) or DEVICES["cpu"]
    plan = StagePlan(
        model=job.model,
        train=train,
        classes=ran_on.classes,
        world_size=ran_on.processes,
        device_bytes=float("inf") if device.gib is None else device.gib * GIB,
    )
    return as_written(plan, on_threads(device, ran_on.threads), ran_on.images)


def _peak(events: list[Event]) -> float:
    """Largest bytes of tensors on the device of rank 0; 0 if they were not counted."""
    return max((event.scalars.get(tags.PEAK_MIB, 0.0) for event in events), default=0.0) * 2**20


def _checkpoint(run_dir: RunDir, stage: str) -> float:
    newest = next(iter(list_checkpoints(run_dir.checkpoints(stage))), None)
    return (
        0.0 if newest is None else float(sum(path.stat().st_size for path in newest[1].iterdir()))
    )


def _step(events: list[Event], expected: Forecast) -> float:
    rates = [event.scalars[tags.IMAGES_PER_S] for event in events if event.kind == "step"]
    # The first interval holds the first step, which compiles.
    usual = statistics.median(rates[1:] or rates) if rates else 0.0
    return expected.train.global_batch / usual if usual else 0.0
