"""Replays a step of a run: the work behind the command replay."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from pipeline.checkpoint.manifest import list_checkpoints
from pipeline.config import job_queries
from pipeline.config.load import load_job
from pipeline.config.schema import Job
from pipeline.errors import DataError
from pipeline.layout import RunDir, find_run
from pipeline.monitor.console import Display

_IN_WORDS = {
    "data": "data: the step is bad because of its images",
    "weights": "weights: the step is bad because of the weights before it",
    "arithmetic": "arithmetic: the run computed the step wrongly",
    "none": "nothing: the step is in order",
}


def replay_step(target: str, runs: Path, step: int, stage: str) -> None:
    """Compute one step again and print what it shows.

    Raises:
        DataError: ``target`` is no run.
        CheckpointError: no state before the step is left.
    """
    run_dir = find_run(target, runs)
    if run_dir is None or not run_dir.run_yaml.is_file():
        raise DataError("is no run of this machine", place=target, remedy="see the command runs")
    job = load_job(run_dir.run_yaml, migrate=True).job
    display = Display(Console(highlight=False))
    # Only now: the command line does not import torch.
    from pipeline.train.replay import replay

    verdict = replay(job, stage or _last_begun(job, run_dir), run_dir, step, display.log)
    display.log(_IN_WORDS[verdict.cause])
    for line in verdict.lines:
        display.log(f"  {line}")


def _last_begun(job: Job, run_dir: RunDir) -> str:
    """The last training stage that has a checkpoint or a capture, else the first one."""
    stages = job_queries.training_stages(job)
    begun = [
        stage
        for stage in stages
        if list_checkpoints(run_dir.checkpoints(stage)) or list_checkpoints(run_dir.captures(stage))
    ]
    if not stages:
        raise DataError("has no training stage", place=str(run_dir.path))
    return (begun or stages)[-1]
