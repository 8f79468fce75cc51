"""What the event log of a run says about its training, on whatever cluster it runs."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.layout import RunDir
from pipeline.monitor.events import Event, read_events


def pretraining(run_dir: RunDir) -> Sequence[Event]:
    """The events of the stage 'pretrain' so far."""
    path = run_dir.events("pretrain")
    return read_events(path) if path.exists() else []


def starts(run_dir: RunDir) -> list[int]:
    """The steps at which groups of processes began."""
    return [event.step for event in pretraining(run_dir) if event.kind == "start"]
