"""Prints the end of a run: a table of the stages, where the results are, and what to do next."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from rich.table import Table

from pipeline.command import command
from pipeline.config import job_queries
from pipeline.config.export_formats import FORMATS
from pipeline.metric_text import metric_text
from pipeline.orchestrate.job_runner import JobRunner
from pipeline.orchestrate.run_state import StageRecord

_OF_BEST = ("selection_top1", "validation_top1", "kept_step")  # with `keep: best`
_METRICS = {  # shown in the table, in this order
    "prepare": ("images", "selection", "validation", "test", "rejected", "duplicates"),
    "pretrain": ("top1", *_OF_BEST, "loss", "steps", "skipped_steps", "images_per_s"),
    "finetune": ("top1", *_OF_BEST, "loss", "steps", "skipped_steps", "images_per_s"),
    "evaluate": ("top1", "top5", "validation_images", "test_images"),
    "export": ("parameters", "reload_difference"),
}


def summarise(run: JobRunner) -> None:
    """Print the table of stages, the locations of the results and the next command."""
    # A table of a run that did nothing would show old numbers as if they were new.
    if run.ran:
        names = job_queries.stage_names(run.job)
        run.display.console.print(table({name: run.run_state.stage(name) for name in names}))
    else:
        run.log("nothing to do: every stage is up to date")
    run.log(f"time             {run.run_state.goodput.in_words()}")
    directory = _relative(run.run_dir.path)
    if run.run_state.stage("export").state == "done":
        export = _relative(run.run_dir.export)
        run.log(f"exported model   {export}   try it: {command('predict', directory, 'IMAGE.jpg')}")
    run.log(f"curves, images   {command('tensorboard', directory)}")
    run_json = _relative(run.run_dir.run_json)
    run.log(f"all metrics      {run_json}   log: {_relative(run.run_dir.run_log)}")
    run.log(f"next             {_next(run)}")


def table(records: Mapping[str, StageRecord]) -> Table:
    """One row per stage: name, state, time and its most important metrics."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "state", "time", "metrics"):
        table.add_column(column, justify="right" if column == "time" else "left")
    for name, record in records.items():
        colour = {"done": "green", "failed": "red"}.get(record.state, "yellow")
        state = record.in_words
        metrics = _metrics(name, record.metrics)
        # Metrics of other data must not stand beside those of the present data.
        if record.outdated:
            colour = "yellow"
            state = "out of date"
            metrics = f"of an earlier {' and '.join(record.outdated)}"
        time = str(timedelta(seconds=round(record.seconds)))
        table.add_row(name, f"[{colour}]{state}[/]", time, metrics)
    return table


def _metrics(stage: str, metrics: Mapping[str, float]) -> str:
    """Example: "top-1 76.2%  loss 1.2340  steps 500  1,234.5 images/s"."""
    shown = list(_METRICS[stage])
    if stage == "evaluate":
        shown += [name for name in metrics if name not in (*shown, "loss")]
    texts = [metric_text(name, metrics[name]) for name in shown if name in metrics]
    if stage == "export":
        texts += [
            f"{name} not written: {facts.install}"
            for name, facts in FORMATS.items()
            if f"{name}_missing" in metrics
        ]
    return "  ".join(texts)


def _relative(path: Path) -> str:
    """The path from the current folder, if it lies inside; as short as a user would type it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _next(run: JobRunner) -> str:
    # Of several possible hints, print the one that is most useful now.
    pending = [
        name
        for name in job_queries.stage_names(run.job)
        if run.run_state.stage(name).state != "done" or run.run_state.stage(name).outdated
    ]
    if pending:
        return f"rerun the same command without --stage, to run: {', '.join(pending)}"
    if run.job.name == "quickstart":
        return f"your own images: {command('run', 'own_images', '--set', 'data.root=DIR')}"
    if run.job.name.endswith("-rehearsal"):
        return "the full job: rerun the same command without --rehearse"
    explain = command("explain", "KEY")
    return f"another seed: --set seed=1 --set name=NAME; the meaning of a key: {explain}"
