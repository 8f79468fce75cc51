"""A run: the stages of a job, one after the other, each only if it has to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from rich.console import Console

from pipeline.config import job_queries, machine, render
from pipeline.config.check import check
from pipeline.config.job_queries import TRAINING
from pipeline.config.load import LoadedJob
from pipeline.config.schema import Job
from pipeline.errors import Interrupted, PipelineError
from pipeline.files import write_text
from pipeline.layout import RunDir
from pipeline.monitor.console import Display, DisplayFeed
from pipeline.orchestrate import artifacts, resume_policy
from pipeline.orchestrate.ray_session import ray_session
from pipeline.orchestrate.ray_tasks import map_tasks
from pipeline.orchestrate.run_state import RunState, run_lock
from pipeline.orchestrate.signals import StopRequest
from pipeline.orchestrate.supervisor import Placement, run_supervised
from pipeline.orchestrate.worker import Entry
from pipeline.prepare.stage import prepare_stage
from pipeline.runtime.dist_env import DistEnv


@dataclass
class JobRunner:
    """A job on its way through its stages. The caller holds the run's lock."""

    loaded: LoadedJob
    run_dir: RunDir
    ledger: RunState
    display: Display
    stop: StopRequest
    ran: list[str] = field(default_factory=list)  # stages that were not skipped

    @property
    def job(self) -> Job:
        return self.loaded.job

    def log(self, text: str, level: str = "info") -> None:
        self.display.log(text, level)


@contextlib.contextmanager
def open_run(loaded: LoadedJob, run_dir: RunDir, console: Console) -> Iterator[JobRunner]:
    """Check the job, take the run's lock, write down what the job resolves to, and take the signals over.

    Raises:
        ConfigError: the job cannot work, or another process works on the run.
    """
    job = loaded.job
    check(job, machine.world_size(job.cluster), loaded.origins, run_dir)
    with run_lock(run_dir):
        run_dir.logs.mkdir(exist_ok=True)
        with open(run_dir.run_log, "a", encoding="utf-8") as log:
            display = Display(console, log)
            stop = StopRequest(lambda text: display.log(text, "warning"))
            stop.install()
            write_text(run_dir.run_yaml, render.job_file(loaded))
            ledger = RunState(run_dir, job.name)
            ledger.declare(job_queries.stage_names(job))
            yield JobRunner(loaded, run_dir, ledger, display, stop)


def run_stages(run: JobRunner, only: Sequence[str] = (), *, force: bool = False) -> None:
    """Bring every stage (or those in ``only``) to ``done``.

    Raises:
        Interrupted: stopped on request; the same command goes on.
        PipelineError: a stage failed, or may not go on with changed settings.
    """
    for stage in only:
        job_queries.stage_config(run.job, stage)  # raises where there is none
    with contextlib.ExitStack() as engine:
        for stage in only or job_queries.stage_names(run.job):
            run.stop.check()
            inputs = artifacts.inputs(run.job, stage, run.run_dir)
            artifacts.require(run.job, stage, inputs)
            record, begun_with = (
                run.ledger.stage(stage),
                resume_policy.settings_of(run.run_dir, stage),
            )
            resolved = run.loaded.resolved()
            decision = resume_policy.decide(
                stage, record, begun_with, resolved, inputs, run.run_dir, force=force
            )
            run.log(f"{stage}: {decision.reason}")
            if decision.action == "skip":
                continue
            if decision.action == "anew":
                _clear(run, stage, keep_what_fits=not force)
            if not run.ran:
                engine.enter_context(_ray(run))
            resume_policy.keep_settings(run.run_dir, stage, resolved)
            run.ledger.begin(stage, inputs, anew=decision.action == "anew")
            run.ran.append(stage)
            _run_stage(run, stage)


def _clear(run: JobRunner, stage: str, *, keep_what_fits: bool) -> None:
    """Move earlier results aside. Preparation knows itself, dataset by dataset, what still fits."""
    if stage == "prepare" and keep_what_fits:
        return
    moved = resume_policy.move_aside(run.run_dir, stage)
    if moved is not None:
        run.log(f"{stage}: its earlier results are now in {moved}", "warning")


def _ray(run: JobRunner) -> contextlib.AbstractContextManager[None]:
    cluster = run.job.cluster
    gpus = machine.gpus() if machine.device(cluster) == "cuda" else 0
    return ray_session(
        max(machine.cores(), machine.world_size(cluster)), gpus, started=run.stop.install
    )


def _run_stage(run: JobRunner, stage: str) -> None:
    began = time.monotonic()
    try:
        with run.display.stage(stage):
            metrics = _prepare(run) if stage == "prepare" else _train_or_use(run, stage)
        outputs = artifacts.outputs(run.job, stage, run.run_dir)
    except Interrupted:
        run.ledger.stop(stage, time.monotonic() - began)
        raise
    except BaseException as error:
        message = error.message if isinstance(error, PipelineError) else repr(error)
        run.ledger.stop(stage, time.monotonic() - began, message)
        raise
    run.ledger.finish(stage, time.monotonic() - began, outputs, metrics)
    run.log(f"{stage}: done in {time.monotonic() - began:,.1f} s  {_headline(metrics)}")


def _headline(metrics: dict[str, float]) -> str:
    """The metrics that people ask for first."""
    shares = [
        f"{name.replace('top', 'top-')} {metrics[name]:.1%}"
        for name in ("top1", "top5")
        if name in metrics
    ]
    counts = [
        f"{name} {metrics[name]:,.0f}" for name in ("images", "parameters") if name in metrics
    ]
    return "  ".join([*shares, *counts])


def _prepare(run: JobRunner) -> dict[str, float]:
    with run.stop.at_once():  # what is finished is on disk already
        return prepare_stage(run.job, run.run_dir, map_tasks, run.display.progress, run.log)


def _train_or_use(run: JobRunner, stage: str) -> dict[str, float]:
    cluster = run.job.cluster
    one = stage == "export"
    placement = Placement(
        stage=stage,
        processes=1 if one else machine.world_size(cluster),
        threads=machine.cores() if one else machine.threads(cluster),
        device="cpu" if one else machine.device(cluster),
        run_dir=run.run_dir,
    )
    follow = DisplayFeed(run.run_dir.events(stage), run.display)

    def tick() -> int:
        follow.poll()
        return follow.highest_step

    metrics = run_supervised(
        entry(run.job, stage, run.run_dir), placement, stop=run.stop, tick=tick, log=run.log
    )
    tick()
    return metrics


def entry(job: Job, stage: str, run_dir: RunDir) -> Entry:
    """What each process of a stage runs."""
    run: Callable[..., dict[str, float]] = (
        _train if stage in TRAINING else _evaluate if stage == "evaluate" else _export
    )
    return partial(run, job, stage, run_dir)


# Imported where they run: the driver itself needs neither torch nor DeepSpeed.


def _train(
    job: Job, stage: str, run_dir: RunDir, world: DistEnv, stop: Callable[[], bool]
) -> dict[str, float]:
    from pipeline.train.trainer import train_stage

    return train_stage(job, stage, run_dir, world, stop)


def _evaluate(
    job: Job, stage: str, run_dir: RunDir, world: DistEnv, stop: Callable[[], bool]
) -> dict[str, float]:
    from pipeline.evaluate.classify import evaluate_stage

    return evaluate_stage(job, run_dir, world)


def _export(
    job: Job, stage: str, run_dir: RunDir, world: DistEnv, stop: Callable[[], bool]
) -> dict[str, float]:
    from pipeline.export.stage import export_stage

    return export_stage(job, run_dir)
