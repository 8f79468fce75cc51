"""Lists the runs of a folder with their state: the work behind the command runs.

The state of a run on a cluster is the scheduler's until its driver works; stages and metrics come
from the run directory where this machine sees it, else from the last lines of the driver's output.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from rich.table import Table
from rich.text import Text

from pipeline.command import command
from pipeline.config import machine
from pipeline.config.job_queries import TRAINING
from pipeline.config.schema import ClusterConfig
from pipeline.errors import ConfigError, Interrupted, StageError
from pipeline.layout import RunDir, runs_in
from pipeline.metric_text import metric_text
from pipeline.monitor import tags
from pipeline.monitor.console import output_console
from pipeline.monitor.events import Event, read_last_events
from pipeline.orchestrate.cluster_run import ClusterRun, cluster_run, exit_code
from pipeline.orchestrate.follow import PROGRESS, waiting_text
from pipeline.orchestrate.run_lock import is_locked
from pipeline.orchestrate.run_state import RunStateRecord, StageRecord, read_run_state

_AGES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))  # largest unit first
_CONCURRENT = 8  # runs that are looked at together
_COLOURS = {"done": "green", "running": "cyan", "failed": "red", "unreadable": "red"}


@dataclass(frozen=True, kw_only=True)
class RunOverview:
    """One run. ``stage``: the one that is running or is next; of a finished run, the last one."""

    name: str
    # running, interrupted, failed, done, not started or unreadable; of a job that waits, why
    state: str
    stage: str
    metric: str  # the last figure, in words
    changed: float  # when a file of the run changed last (seconds since 1970)
    left: str = ""  # time to the end of a training stage under way
    gpu_hours: float = 0.0
    where: str = ""  # kind of the cluster; empty: this machine
    job: str = ""  # ID of the cluster's job


# Title of a column -> its text. The columns of the table, in this order.
COLUMNS: dict[str, Callable[[RunOverview], Text]] = {
    "run": lambda run: Text(run.name),
    "state": lambda run: Text(run.state, _COLOURS.get(run.state, "yellow")),
    "stage": lambda run: Text(run.stage),
    "last": lambda run: Text(run.metric),
    "left": lambda run: Text(run.left),
    "GPU-hours": lambda run: Text(f"{run.gpu_hours:,.1f}" if run.gpu_hours else ""),
    "where": lambda run: Text(run.where),
    "job": lambda run: Text(run.job),
    "age": lambda run: Text(age(time.time() - run.changed)),
}

_OPTIONAL = ("left", "GPU-hours", "where", "job")


def print_runs(folder: Path) -> None:
    """Print a table of the runs in ``folder``; the one that changed last comes first."""
    runs = sorted(overviews(folder), key=lambda run: run.changed, reverse=True)
    if not runs:
        print(f"no runs in {folder}; a first one: {command('run', 'quickstart')}", file=sys.stderr)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    cells = {title: [text(run) for run in runs] for title, text in COLUMNS.items()}
    # Without a run on a GPU or a cluster, their columns would only take space.
    cells = {
        title: column for title, column in cells.items() if any(column) or title not in _OPTIONAL
    }
    for title in cells:
        table.add_column(title, overflow="fold")
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    output_console().print(table)


def overviews(folder: Path) -> list[RunOverview]:
    """Every run of a folder, in the order of the names. A damaged one does not hide the others."""
    # Each cluster answers in its own time.
    with ThreadPoolExecutor(_CONCURRENT) as pool:
        return list(pool.map(_overview, runs_in(folder)))


def age(seconds: float) -> str:
    """A duration in its largest unit, rounded down: 7300 -> "2 h"."""
    for unit, name in _AGES:
        if seconds >= unit:
            return f"{int(seconds // unit)} {name}"
    return "0 s"


def _overview(run_dir: RunDir) -> RunOverview:
    name = run_dir.path.name
    damaged = run_dir.cluster_json
    try:
        run = cluster_run(run_dir)
        here = (run.here if run is not None else None) or run_dir
        damaged = here.run_json
        record = read_run_state(here)
    except StageError:
        return RunOverview(
            name=name,
            state="unreadable",
            stage="",
            metric=f"{damaged.name} is damaged",
            changed=_changed(run_dir, ""),
        )
    overview = _from_files(name, here, record)
    if run is None:
        return overview
    overview = replace(overview, where=run.record.kind, job=run.record.id)
    # Of a finished run, the cluster may have forgotten the job.
    return overview if overview.state == "done" else _with_state_of_job(overview, run)


def _from_files(name: str, run_dir: RunDir, record: RunStateRecord | None) -> RunOverview:
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
        name=name,
        state=state,
        stage=stage,
        metric=_metric(run_dir, stages, stage),
        changed=_changed(run_dir, stage),
        left=_time_left(run_dir, stage) if state == "running" else "",
        gpu_hours=_gpu_hours(run_dir, stages),
    )


def _with_state_of_job(overview: RunOverview, run: ClusterRun) -> RunOverview:
    """The overview of a run that is not finished, with what the cluster knows of its job."""
    # One cluster that does not answer must not hide the other runs.
    try:
        job = run.state()
        output = _last_output(run) if run.here is None and job.phase != "pending" else ""
    except ConfigError as error:
        return replace(overview, state=f"not known: {error.cause}")
    if job.phase == "pending":
        return replace(overview, state=f"pending: {waiting_text(job)}")
    # The files know more than the cluster, except that a driver on another machine is alive.
    if run.here is not None:
        return replace(overview, state="running") if job.phase == "running" else overview
    progress = [match for line in output.splitlines() if (match := PROGRESS.fullmatch(line))]
    if progress:
        stage, step, left = progress[-1]["stage"], progress[-1]["step"], progress[-1]["left"] or ""
        overview = replace(overview, stage=stage, metric=f"step {step}", left=left)
    ended = {0: "done", Interrupted.exit_code: "interrupted"}.get(exit_code(run, job), "failed")
    changed = job.ended or time.time()
    return replace(overview, state="running" if job.under_way else ended, changed=changed)


def _last_output(run: ClusterRun) -> str:
    return run.launcher.log(run.record.id, run.record.run_dir.path, 0).decode(errors="replace")


def _gpu_hours(run_dir: RunDir, stages: dict[str, StageRecord]) -> float:
    """GPUs x hours of all stages and attempts, as far as they have ended."""
    hours = 0.0
    for name, record in stages.items():
        # Preparation computes on CPUs.
        if name == "prepare" or not record.seconds:
            continue
        try:
            started_with = json.loads(run_dir.started_with(name).read_text(encoding="utf-8"))
            cluster = ClusterConfig.model_validate(started_with["cluster"])
        except (OSError, ValueError, KeyError):
            continue
        if machine.device(cluster) == "cuda":
            hours += record.seconds / 3600 * machine.world_size(cluster)
    return hours


def _time_left(run_dir: RunDir, stage: str) -> str:
    """The time that the rest of a training stage takes at its present speed; '' if not known."""
    steps: list[Event] = []
    for event in read_last_events(run_dir.events(stage)):
        # An attempt before a restart had another speed, and its pause is not part of any.
        if event.kind == "start":
            steps = []
        elif event.kind == "step":
            steps.append(event)
    if len(steps) < 2 or steps[-1].step <= steps[0].step:
        return ""
    first, last = steps[0], steps[-1]
    pace = (last.time - first.time) / (last.step - first.step)
    return str(timedelta(seconds=round(pace * max(0, last.total - last.step))))


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
