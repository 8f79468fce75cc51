"""Runs the stages of a job in order, each one only if it is needed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from pipeline.config import job_queries, machine, render
from pipeline.config.check_on_machine import check_on_machine
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
from pipeline.orchestrate.stage_functions import placement, stage_fn
from pipeline.orchestrate.supervisor import run_supervised
from pipeline.prepare.stage import prepare_stage


@dataclass(kw_only=True)
class JobRunner:
    """A job whose stages are being run. The caller holds the lock of the run."""

    loaded: LoadedJob
    run_dir: RunDir
    run_state: RunState
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
    """Check the job, lock the run, install the signal handlers, write run.yaml.

    Raises:
        ConfigError: the job cannot work, or another process is working on the run.
    """
    loaded = check_on_machine(loaded, run_dir)
    job = loaded.job
    with run_lock(run_dir):
        run_dir.logs.mkdir(exist_ok=True)
        with open(run_dir.run_log, "a", encoding="utf-8") as log_file:
            display = Display(console, log_file)
            stop = StopRequest(lambda text: display.log(text, "warning"))
            stop.install()
            # run.yaml is for people and for `data show`; resuming compares the settings that each
            # stage keeps for itself.
            write_text(run_dir.run_yaml, render.job_file(loaded))
            run_state = RunState(run_dir, job.name)
            run_state.declare(job_queries.stage_names(job))
            yield JobRunner(
                loaded=loaded, run_dir=run_dir, run_state=run_state, display=display, stop=stop
            )


def run_stages(run: JobRunner, only: Sequence[str] = (), *, force: bool = False) -> None:
    """Run every stage of the job, or those in ``only``, until it is done.

    Raises:
        Interrupted: stopped on request; the same command resumes.
        PipelineError: a stage failed, or cannot resume with changed settings.
    """
    # Report a misspelled stage before the first one runs for days.
    for stage in only:
        job_queries.stage_config(run.job, stage)  # raises if the job has no such stage
    with contextlib.ExitStack() as ray:
        for stage in only or job_queries.stage_names(run.job):
            run.stop.check()
            # 1. Find out what has changed since the stage was started.
            inputs = artifacts.inputs(run.job, stage, run.run_dir)
            artifacts.require(run.job, stage, inputs)
            resolved = run.loaded.resolved()
            decision = resume_policy.decide(
                stage,
                run.run_state.stage(stage),
                started_with=resume_policy.settings_of(run.run_dir, stage),
                resolved=resolved,
                inputs=inputs,
                run_dir=run.run_dir,
                force=force,
            )
            run.log(f"{stage}: {decision.reason}")
            if decision.action == "skip":
                continue
            # 2. Make room for new results.
            restart = decision.action == "restart"
            if restart:
                _clear(run, stage, keep_valid_datasets=not force)
            # 3. Run it. Ray starts with the first stage that needs it.
            if not run.ran:
                ray.enter_context(_ray(run))
            resume_policy.keep_settings(run.run_dir, stage, resolved)
            run.run_state.start(stage, inputs, from_scratch=restart)
            run.ran.append(stage)
            _run_stage(run, stage)


def _clear(run: JobRunner, stage: str, *, keep_valid_datasets: bool) -> None:
    # Preparation compares fingerprints itself, dataset by dataset, and replaces only those that
    # no longer match.
    if stage == "prepare" and keep_valid_datasets:
        return
    moved = resume_policy.move_aside(run.run_dir, stage)
    if moved is not None:
        run.log(f"{stage}: moved its earlier results to {moved}", "warning")


def _ray(run: JobRunner) -> contextlib.AbstractContextManager[None]:
    cluster = run.job.cluster
    gpus = machine.gpus() if machine.device(cluster) == "cuda" else 0
    # Each training process takes one CPU of Ray, also on a machine with fewer cores than processes.
    cpus = max(machine.cores(), machine.world_size(cluster))
    return ray_session(cpus, gpus, started=run.stop.install)


def _run_stage(run: JobRunner, stage: str) -> None:
    started = time.monotonic()
    try:
        with run.display.stage(stage):
            metrics = _prepare(run) if stage == "prepare" else _supervise(run, stage)
        outputs = artifacts.outputs(run.job, stage, run.run_dir)
    except (Interrupted, KeyboardInterrupt):
        # Not a failure: the stage is pending and resumes.
        run.run_state.stop(stage, time.monotonic() - started)
        raise
    except BaseException as error:
        message = error.message if isinstance(error, PipelineError) else repr(error)
        run.run_state.stop(stage, time.monotonic() - started, message)
        raise
    seconds = time.monotonic() - started
    run.run_state.finish(stage, seconds, outputs, metrics)
    run.log(f"{stage}: done in {seconds:,.1f} s  {_headline(metrics)}")


def _headline(metrics: dict[str, float]) -> str:
    """The most important metrics, for example "top-1 76.2%  top-5 93.1%  images 50,000"."""
    accuracies = [
        f"{name.replace('top', 'top-')} {metrics[name]:.1%}"
        for name in ("top1", "top5")
        if name in metrics
    ]
    counts = [
        f"{name} {metrics[name]:,.0f}" for name in ("images", "parameters") if name in metrics
    ]
    return "  ".join([*accuracies, *counts])


def _prepare(run: JobRunner) -> dict[str, float]:
    # Finished pieces are on disk already, so a stop request ends preparation at once.
    with run.stop.at_once():
        return prepare_stage(run.job, run.run_dir, map_tasks, run.display.progress, run.log)


def _supervise(run: JobRunner, stage: str) -> dict[str, float]:
    """Run a stage in its group of processes and show its events."""
    feed = DisplayFeed(run.run_dir.events(stage), run.display)

    def poll() -> int:
        feed.poll()
        return feed.highest_step

    saves_first = run.stop.after_step() if stage in TRAINING else contextlib.nullcontext()
    with saves_first:
        metrics = run_supervised(
            stage_fn(run.job, stage, run.run_dir),
            placement(run.job, stage, run.run_dir),
            stop=run.stop,
            poll=poll,
            log=run.log,
        )
    # Show the events that the stage wrote after the supervisor's last poll.
    poll()
    return metrics
