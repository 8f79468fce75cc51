"""A run whose stages are done, without training: real data and records, weights of a few bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from pipeline.checkpoint.weights_file import write_weights_file
from pipeline.config import job_queries
from pipeline.config.load import LoadedJob, load_job
from pipeline.config.stage_settings import keep_settings
from pipeline.files import write_json
from pipeline.layout import WEIGHTS_JSON, RunDir
from pipeline.orchestrate import artifacts
from pipeline.orchestrate.job_runner import open_run, run_stages
from pipeline.orchestrate.judgement import Judge
from pipeline.orchestrate.resume_policy import Decision
from pipeline.orchestrate.run_state import RunState
from pipeline.prepare.stage import prepare_stage
from tests.prepare.source_folders import class_tars, serial

STEPS = 6
JOB = """
name: small
model: {{channels: [8, 8, 8, 8], depths: [1, 1, 1, 1], columns: 1}}
cluster: {{processes: 1}}
data: {{root: {root}, min_side: 16, shard_rows: 30}}
stages:
  prepare: {{}}
  pretrain:
    {{image_size: 32, epochs: 2, global_batch: 16, precision: fp32, base_lr: 1e-3,
     intermediate_supervision: false, augment: {{mixup: 0, cutmix: 0}}}}
  finetune:
    {{from: pretrain, image_size: 32, epochs: 1, global_batch: 16, precision: fp32, base_lr: 1e-3,
     intermediate_supervision: false, augment: {{mixup: 0, cutmix: 0}}}}
  evaluate: {{from: finetune}}
  export: {{from: finetune}}
"""


@dataclass(frozen=True)
class FinishedRun:
    """A job file and the directory of its run."""

    job: Path
    run_dir: RunDir

    def load(self, *overrides: str) -> LoadedJob:
        return load_job(self.job, overrides)

    def call(self, *overrides: str, stages: Sequence[str] = (), force: bool = False) -> str:
        """Run the job in this process; its output. It must not come to run a stage."""
        console = Console(record=True, width=200)
        with open_run(self.load(*overrides), self.run_dir, console) as run:
            run_stages(run, stages, force=force)
            assert run.ran == []
        return console.export_text()

    def decisions(self, *overrides: str, stages: Sequence[str] = ()) -> dict[str, Decision]:
        """What the stages of a call would do."""
        loaded = self.load(*overrides)
        judge = Judge(
            job=loaded.job,
            resolved=loaded.resolved(),
            run_dir=self.run_dir,
            run_state=RunState(self.run_dir, "small"),
            stages=stages or job_queries.stage_names(loaded.job),
            thorough=bool(stages),
        )
        return judge.judge_all(force=False)

    def actions(self, *overrides: str, stages: Sequence[str] = ()) -> dict[str, str]:
        decisions = self.decisions(*overrides, stages=stages)
        return {stage: decision.action for stage, decision in decisions.items()}


def write_training(run_dir: RunDir, stage: str, *, finished: bool = True) -> None:
    """Files of a training: a checkpoint, an event log of 30 minutes, and weights at the end."""
    checkpoint = run_dir.checkpoints(stage) / f"step-{STEPS:08d}"
    checkpoint.mkdir(parents=True)
    events = [
        {"kind": "start", "step": 0, "time": 1000.0},
        {"kind": "step", "step": 3, "time": 1600.0, "total": STEPS},
        # A day passes between two attempts.
        {"kind": "start", "step": 3, "time": 88000.0},
        {"kind": "step", "step": 6, "time": 89200.0, "total": STEPS},
    ]
    run_dir.logs.mkdir(exist_ok=True)
    run_dir.events(stage).write_text("".join(json.dumps(event) + "\n" for event in events))
    if finished:
        weights = run_dir.weights(stage)
        weights.parent.mkdir(parents=True, exist_ok=True)
        write_weights_file(weights, {stage: torch.zeros(1)})
        weights.with_name(WEIGHTS_JSON).write_text("{}")


def make(folder: Path, *, classes: int = 3, count: int = 16) -> FinishedRun:
    """Prepare images in ``folder``/flowers, and record the other stages as done."""
    root = class_tars(folder / "flowers", classes=classes, count=count, validation=4)
    job = folder / "small.yaml"
    job.write_text(JOB.format(root=root))
    run = FinishedRun(job, RunDir(folder / "runs" / "small"))
    run.run_dir.path.mkdir(parents=True)
    finish_all(run, run.load())
    return run


def finish_all(run: FinishedRun, loaded: LoadedJob) -> None:
    """Do, or pretend to do, every stage of the job."""
    run_dir = run.run_dir
    state = RunState(run_dir, loaded.job.name)
    state.declare(job_queries.stage_names(loaded.job))
    for stage in job_queries.stage_names(loaded.job):
        keep_settings(run_dir, stage, loaded.resolved())
        state.start(stage, artifacts.inputs(loaded.job, stage, run_dir), from_scratch=False)
        metrics = {"top1": 0.5}
        if stage == "prepare":
            metrics = prepare_stage(loaded.job, run_dir, serial, lambda *_: None, lambda *_: None)
        elif stage in job_queries.TRAINING:
            write_training(run_dir, stage)
            metrics |= {"steps": STEPS}
        elif stage == "evaluate":
            write_json(run_dir.evaluation, metrics)
        elif stage == "export":
            run_dir.export.mkdir()
            (run_dir.export / "model.json").write_text("{}")
        state.finish(stage, 1.0, artifacts.outputs(loaded.job, stage, run_dir), metrics)
