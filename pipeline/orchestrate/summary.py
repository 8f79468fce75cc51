"""The end of a run: what each stage came to, where everything is, and what to try next."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from rich.table import Table

from pipeline.config import job_queries
from pipeline.orchestrate.job_runner import JobRunner
from pipeline.orchestrate.run_state import StageRecord

_METRICS = {
    "prepare": ("images", "validation", "rejected", "duplicates"),
    "pretrain": ("top1", "loss", "steps", "images_per_s"),
    "finetune": ("top1", "loss", "steps", "images_per_s"),
    "evaluate": ("top1", "top5", "images"),
    "export": ("parameters", "reload_difference"),
}


def summarise(run: JobRunner) -> None:
    """Print the table of stages, then where things are and the next command."""
    names = job_queries.stage_names(run.job)
    if run.ran:
        run.display.console.print(_table({name: run.ledger.stage(name) for name in names}))
    else:
        run.log("nothing to do: every stage is done and nothing has changed")
    directory = _shown(run.run_dir.path)
    if run.ledger.stage("export").state == "done":
        run.log(
            f"exported model   {directory}/export   try it: ./launch.sh predict {directory}/export IMAGE.jpg"
        )
    run.log(f"curves, images   ./launch.sh tensorboard {directory}")
    run.log(f"all metrics      {directory}/run.json   log: {directory}/logs/run.log")
    run.log(f"next             {_next(run)}")


def _table(records: dict[str, StageRecord]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "state", "time", "metrics"):
        table.add_column(column, justify="right" if column == "time" else "left")
    for name, record in records.items():
        colour = {"done": "green", "failed": "red"}.get(record.state, "yellow")
        time = str(timedelta(seconds=round(record.seconds)))
        table.add_row(name, f"[{colour}]{record.state}[/]", time, _metrics(name, record.metrics))
    return table


def _metrics(stage: str, metrics: dict[str, float]) -> str:
    parts = []
    for name in _METRICS[stage]:
        if name in ("top1", "top5") and name in metrics:
            parts.append(f"{name.replace('top', 'top-')} {metrics[name]:.1%}")
        elif name in metrics:
            parts.append(
                f"{name.replace('images_per_s', 'images/s').replace('_', ' ')} {_number(metrics[name])}"
            )
    return "  ".join(parts)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _next(run: JobRunner) -> str:
    pending = [
        name for name in job_queries.stage_names(run.job) if run.ledger.stage(name).state != "done"
    ]
    if pending:
        return f"the same command without --stage: {', '.join(pending)} to do"
    if run.job.name == "quickstart":
        return "your own images: ./launch.sh jobs/own_images.yaml --set data.root=DIR"
    if run.job.name.endswith("-rehearsal"):
        return "the real thing: the same command without --rehearse"
    return "another seed: --set seed=1 --set name=NAME; what a key means: ./launch.sh explain KEY"
