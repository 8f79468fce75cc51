"""Lists the runs of a folder with their state: the work behind the command runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.command import command
from pipeline.config.job_queries import TRAINING
from pipeline.errors import StageError
from pipeline.layout import RunDir, runs_in
from pipeline.metric_text import metric_text
from pipeline.monitor import tags
from pipeline.monitor.events import read_last_events
from pipeline.orchestrate.run_lock import is_locked
from pipeline.orchestrate.run_state import RunStateRecord, StageRecord, read_run_state

_PIPE_WIDTH = 160  # columns of the table where the output is no terminal
_AGES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))  # largest unit first
_COLOURS = {"done": "green", "running": "cyan", "failed": "red", "unreadable": "red"}


@dataclass(frozen=True, kw_only=True)
class RunOverview:
    """One run. ``stage``: the one that is running or is next; of a finished run, the last one."""

    name: str
    state: str  # running, interrupted, failed, done, not started or unreadable
    stage: str
    metric: str  # the last figure, in words
    changed: float  # when a file of the run changed last (seconds since 1970)


# Title of a column -> its text. The columns of the table, in this order.
COLUMNS: dict[str, Callable[[RunOverview], Text]] = {
    "run": lambda run: Text(run.name),
    "state": lambda run: Text(run.state, _COLOURS.get(run.state, "yellow")),
    "stage": lambda run: Text(run.stage),
    "last": lambda run: Text(run.metric),
    "age": lambda run: Text(age(time.time() - run.changed)),
}


def print_runs(folder: Path) -> None:
    """Print a table of the runs in ``folder``; the one that changed last comes first."""
    runs = sorted(overviews(folder), key=lambda run: run.changed, reverse=True)
    if not runs:
        print(f"no runs in {folder}; a first one: {command('run', 'quickstart')}", file=sys.stderr)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in COLUMNS:
        table.add_column(title, overflow="fold")
    for run in runs:
        table.add_row(*(text(run) for text in COLUMNS.values()))
    Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)


def overviews(folder: Path) -> Iterator[RunOverview]:
    """Every run of a folder, in the order of the names. A damaged one does not hide the others."""
    for run_dir in runs_in(folder):
        try:
            record = read_run_state(run_dir)
        except StageError:
            yield RunOverview(
                name=run_dir.path.name,
                state="unreadable",
                stage="",
                metric=f"{run_dir.run_json.name} is damaged",
                changed=_changed(run_dir, ""),
            )
        else:
            yield _overview(run_dir, record)


def age(seconds: float) -> str:
    """A duration in its largest unit, rounded down: 7300 -> "2 h"."""
    for unit, name in _AGES:
        if seconds >= unit:
            return f"{int(seconds // unit)} {name}"
    return "0 s"


def _overview(run_dir: RunDir, record: RunStateRecord | None) -> RunOverview:
    stages = record.stages if record is not None else {}
    stage = next((name for name, state in stages.items() if state.state != "done"), "")
    # The lock decides whether a process works on the run: run.json of a killed one still says
    # "running", and between two stages it says "pending".
    if stages and not stage:
        state = "done"
        stage = list(stages)[-1]
    elif is_locked(run_dir):
        state = "running"
    else:
        state = _state_at_rest(stages, stage)
    return RunOverview(
        name=run_dir.path.name,
        state=state,
        stage=stage,
        metric=_metric(run_dir, stages, stage),
        changed=_changed(run_dir, stage),
    )


def _state_at_rest(stages: dict[str, StageRecord], next_stage: str) -> str:
    """The state of a run that is not finished, while no process works on it."""
    if any(record.state == "failed" for record in stages.values()):
        return "failed"
    begun = any(record.in_words != "not started" for record in stages.values())
    return "interrupted" if begun and next_stage else "not started"


def _metric(run_dir: RunDir, stages: dict[str, StageRecord], stage: str) -> str:
    """The last figure: progress of a training stage under way, or the newest recorded accuracy."""
    if stage in TRAINING and stages[stage].state != "done":
        progress = _training_progress(run_dir, stage)
        if progress:
            return progress
    recorded = [record.metrics for record in stages.values() if record.state == "done"]
    for name in ("top1", "images"):  # preparation has no accuracy yet, but a number of images
        for metrics in reversed(recorded):
            if name in metrics:
                return metric_text(name, metrics[name])
    return ""


def _training_progress(run_dir: RunDir, stage: str) -> str:
    """Example: "step 120/400  top-1 45.0%", or the loss before the first evaluation."""
    position = ""
    loss = ""
    accuracy = ""
    for event in read_last_events(run_dir.events(stage)):
        if event.kind == "step":
            position = f"step {event.step:,}/{event.total:,}"
            loss = metric_text(tags.LOSS, event.scalars[tags.LOSS]) if event.scalars else loss
        elif event.kind == "evaluation" and tags.TOP1 in event.scalars:
            accuracy = metric_text(tags.TOP1, event.scalars[tags.TOP1])
    return "  ".join(part for part in (position, accuracy or loss) if part)


def _changed(run_dir: RunDir, stage: str) -> float:
    files = [run_dir.run_json, run_dir.run_yaml, run_dir.run_log, run_dir.events(stage)]
    return max((path.stat().st_mtime for path in files if path.is_file()), default=0.0)
