"""Measures the work that a restart of a stage from scratch would discard."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise

from pipeline.checkpoint.manifest import list_checkpoints
from pipeline.config.job_queries import TRAINING
from pipeline.layout import RunDir
from pipeline.monitor.events import Event, Follower
from pipeline.orchestrate.run_state import StageRecord
from pipeline.prepare.forecast import finished_units


def at_stake(stage: str, record: StageRecord, run_dir: RunDir, datasets: Sequence[str]) -> str:
    """The work of a stage in words, for example "1,200 of 5,000 steps, 3:20:00 of training".

    '' if the stage has none that is worth a question: an evaluation, an export, a training without
    a checkpoint, a finished preparation (its datasets are judged by the trainings that use them).

    Args:
        datasets: the names of the datasets that preparation writes.
    """
    if stage == "prepare":
        targets = [run_dir.dataset(name) for name in datasets]
        units = sum(finished_units(target) for target in targets) if record.state != "done" else 0
        return f"{units:,} units of the source already read" if units else ""
    if stage not in TRAINING:
        return ""
    checkpoints = list_checkpoints(run_dir.checkpoints(stage))
    if record.state != "done" and not checkpoints and not run_dir.weights(stage).exists():
        return ""
    events = Follower(run_dir.events(stage)).poll()
    total = max((event.total for event in events), default=0)
    steps = checkpoints[0][0] if checkpoints else int(record.metrics.get("steps", 0))
    seconds = max(record.seconds, _seconds(events))
    duration = timedelta(seconds=round(seconds))
    return f"{steps:,} of {max(total, steps):,} steps, {duration} of training"


def _seconds(events: Sequence[Event]) -> float:
    """Time that all attempts of a stage took, also those that were killed.

    The time between attempts does not count. Example: "start 0:00, last event 0:50, start 9:00,
    last event 9:20" is 50 + 20 minutes.
    """
    seconds = 0.0
    for before, event in pairwise(events):
        if event.kind != "start":
            seconds += event.time - before.time
    return seconds
