"""Runs the stages of a job in order, each one only if it is needed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from pipeline.config import job_queries, machine, render
from pipeline.config.check_on_machine import check_on_machine
from pipeline.config.job_queries import TRAINING
from pipeline.config.load import LoadedJob
from pipeline.config.schema import Job
from pipeline.config.stage_settings import keep_settings
from pipeline.data.job_dataset import require_cache_room
from pipeline.errors import Interrupted, PipelineError
from pipeline.files import with_digest_line, write_text
from pipeline.layout import RunDir
from pipeline.metric_text import metric_text
from pipeline.monitor.console import Display, DisplayFeed
from pipeline.monitor.goodput import EVALUATION, PREPARE, START, Timeline, process_start
from pipeline.orchestrate import artifacts, preflight, resume_policy
from pipeline.orchestrate.disk_watch import watched_disk
from pipeline.orchestrate.joined_ray import ADDRESS, JoinedRay, joined_ray
from pipeline.orchestrate.judgement import Judge
from pipeline.orchestrate.machine_pool import MachinePool
from pipeline.orchestrate.mirror import Mirror
from pipeline.orchestrate.ray_session import RaySession, ray_session
from pipeline.orchestrate.resume_policy import Decision, Resolved
from pipeline.orchestrate.run_lock import run_lock
from pipeline.orchestrate.run_state import RunState
from pipeline.orchestrate.signals import StopRequest
from pipeline.orchestrate.stage_functions import placement, stage_fn
from pipeline.orchestrate.supervisor import Watch, run_supervised
from pipeline.prepare.stage import prepare_stage


@dataclass(kw_only=True)
class JobRunner:
    """A job whose stages are being run. The caller holds the lock of the run."""

    loaded: LoadedJob
    run_dir: RunDir
    run_state: RunState
    display: Display
    stop: StopRequest
    timeline: Timeline | None = None  # None: nothing will run
    ran: list[str] = field(default_factory=list)  # stages that were not skipped
    ray: RaySession | None = None  # started by the first stage that needs it
    pool: MachinePool | None = None  # of a cluster; None: this machine only

    @property
    def job(self) -> Job:
        return self.loaded.job

    def log(self, text: str, level: str = "info") -> None:
        self.display.log(text, level)

    def phase(self, part: str) -> None:
        """From now on, the time of the run belongs to ``part``."""
        if self.timeline is not None:
            self.timeline.phase(part)
            self.run_state.account(self.timeline.goodput)


@contextlib.contextmanager
def open_run(loaded: LoadedJob, run_dir: RunDir, console: Console) -> Iterator[JobRunner]:
    """Check the job, lock the run, install the signal handlers.

    Raises:
        ConfigError: the job cannot work, or another process is working on the run.
    """
    loaded = check_on_machine(loaded, run_dir)
    job = loaded.job
    require_cache_room(job, run_dir)
    with run_lock(run_dir):
        run_dir.logs.mkdir(exist_ok=True)
        with open(run_dir.run_log, "a", encoding="utf-8", errors="backslashreplace") as log_file:
            display = Display(console, log_file)
            stop = StopRequest(lambda text: display.log(text, "warning"))
            stop.install()
            mirror = Mirror.of(job, run_dir)
            if mirror is not None and not run_dir.run_json.exists():
                with stop.at_once():
                    mirror.restore(display.log)
            run_state = RunState(run_dir, job.name)
            run_state.declare(job_queries.stage_names(job))
            timeline = Timeline(run_dir, job_queries.training_stages(job), started=process_start())
            try:
                yield JobRunner(
                    loaded=loaded,
                    run_dir=run_dir,
                    run_state=run_state,
                    display=display,
                    stop=stop,
                    timeline=timeline,
                )
            finally:
                timeline.close()
                run_state.account(timeline.goodput)


def run_stages(run: JobRunner, only: Sequence[str] = (), *, force: bool = False) -> None:
    """Run every stage of the job, or those in ``only``, until it is done.

    Args:
        force: restart these stages from scratch.

    Raises:
        Interrupted: stopped on request; the same command (without --force) resumes.
        PipelineError: a stage failed, or finished work would be lost.
    """
    # Report a misspelled stage before the first one runs for days.
    for stage in only:
        job_queries.stage_config(run.job, stage)  # raises if the job has no such stage
    names = job_queries.stage_names(run.job)
    stages = [name for name in names if name in only] if only else names
    # 1. Judge all stages before the first one changes anything.
    judge = Judge(
        job=run.job,
        resolved=run.loaded.resolved(),
        run_dir=run.run_dir,
        run_state=run.run_state,
        stages=stages,
        thorough=bool(only),
    )
    decisions = judge.judge_all(force=force)
    # run.yaml is for people and for `data show`; resuming compares the settings that each stage
    # keeps for itself.
    write_text(run.run_dir.run_yaml, with_digest_line(render.job_file(run.loaded)))
    # 2. Forced stages lose their results together and now: a forced run that is interrupted in its
    # first stage must not find the later ones done when it resumes.
    for stage in stages if force else ():
        run.log(f"{stage}: {decisions[stage].reason}")
        _move_aside(run, stage)
    with contextlib.ExitStack() as stack:
        for stage in stages:
            run.stop.check()
            # 3. Decide again if an earlier stage has run: its results are known by now.
            inputs = artifacts.inputs(
                run.job, stage, run.run_dir, artifacts.finished_weights(run.run_dir, run.run_state)
            )
            artifacts.require(run.job, stage, inputs)
            decision = judge.decide(stage, inputs) if run.ran or force else decisions[stage]
            if decision.action == "refuse":
                raise judge.refusal({stage: decision})
            if not force:
                run.log(f"{stage}: {decision.reason}")
            if decision.action == "skip":
                _keep_lost_settings(run, stage, judge.resolved)
                continue
            _make_room(run, stage, decision)
            # 4. Run it. Ray starts with the first stage that needs it.
            if run.ray is None:
                run.ray = stack.enter_context(_ray(run))
            keep_settings(run.run_dir, stage, judge.resolved)
            restart = decision.action == "restart"
            run.run_state.start(stage, inputs, from_scratch=restart)
            run.ran.append(stage)
            _run_stage(run, stage, run.ray)
            _mark_outdated(run)


def _keep_lost_settings(run: JobRunner, stage: str, resolved: Resolved) -> None:
    """Write the record of a finished stage's settings again, if the user deleted it."""
    if not run.run_dir.started_with(stage).exists():
        keep_settings(run.run_dir, stage, resolved)
        run.log(f"{stage}: its settings were not recorded; the present ones are now", "warning")


def _make_room(run: JobRunner, stage: str, decision: Decision) -> None:
    """Move away what a stage will write again."""
    if decision.action == "repair":
        resume_policy.set_aside(run.run_dir, stage, decision.damaged)
    # Preparation compares fingerprints itself, dataset by dataset, and replaces only those that
    # no longer match.
    elif decision.action == "restart" and stage != "prepare":
        _move_aside(run, stage)


def _move_aside(run: JobRunner, stage: str) -> None:
    moved = resume_policy.move_aside(run.run_dir, stage)
    run.run_state.reset(stage)
    if moved is not None:
        run.log(f"{stage}: moved its earlier results to {moved}", "warning")


def _mark_outdated(run: JobRunner) -> None:
    """Record which finished stages used inputs that are not the present ones."""
    known = artifacts.finished_weights(run.run_dir, run.run_state)
    for stage in job_queries.stage_names(run.job):
        record = run.run_state.stage(stage)
        if stage == "prepare" or record.state != "done":
            continue
        inputs = artifacts.inputs(run.job, stage, run.run_dir, known)
        changed = artifacts.changed_inputs(record, inputs, run.job, stage, run.run_dir)
        run.run_state.set_outdated(stage, changed)


@contextlib.contextmanager
def _ray(run: JobRunner) -> Iterator[RaySession]:
    """Ray for the stages: our own on this machine, or the cluster that this process is part of."""
    address = os.environ.get(ADDRESS, "")
    cluster = run.job.cluster
    if address and cluster.kind != "local":
        with joined_ray(address, run.stop.check) as joined:

            def check() -> None:
                joined.check()
                run.stop.check()

            run.pool = MachinePool(job=run.job, head=joined.head, check=check, log=run.log)
            machines = run.pool.wait_for_all()
            unfit = preflight.require(run.job, run.run_dir, machines, check, run.log)
            run.pool.left_out = unfit
            joined.left_out = unfit
            yield joined
        return
    gpus = machine.gpus() if machine.device(cluster) == "cuda" else 0
    # Each training process takes one CPU of Ray, also on a machine with fewer cores than processes.
    cpus = max(machine.cores(), machine.world_size(cluster))
    with ray_session(cpus, gpus, check=run.stop.check) as session:
        yield session


def _run_stage(run: JobRunner, stage: str, ray: RaySession) -> None:
    started = time.monotonic()
    run.phase({"prepare": PREPARE}.get(stage, START if stage in TRAINING else EVALUATION))
    try:
        with run.display.stage(stage), ray.explained():
            metrics = _prepare(run, ray) if stage == "prepare" else _supervise(run, stage, ray)
        outputs = artifacts.outputs(run.job, stage, run.run_dir)
    except (Interrupted, KeyboardInterrupt):
        # Not a failure: the stage is pending and resumes.
        run.run_state.stop(stage, time.monotonic() - started)
        raise
    except BaseException as error:
        message = error.message if isinstance(error, PipelineError) else repr(error)
        run.run_state.stop(stage, time.monotonic() - started, message)
        raise
    finally:
        # What follows connects this stage with the next one.
        run.phase(START)
    seconds = time.monotonic() - started
    run.run_state.finish(stage, seconds, outputs, metrics)
    run.log(f"{stage}: done in {seconds:,.1f} s  {_headline(metrics)}")


def _headline(metrics: dict[str, float]) -> str:
    """The most important metrics, for example "top-1 76.2%  top-5 93.1%  images 50,000"."""
    names = ("top1", "top5", "images", "validation_images", "test_images", "parameters")
    return "  ".join(metric_text(name, metrics[name]) for name in names if name in metrics)


def _prepare(run: JobRunner, ray: RaySession) -> dict[str, float]:
    # Finished pieces are on disk already, so a stop request ends preparation at once.
    with run.stop.at_once():
        metrics = prepare_stage(run.job, run.run_dir, ray.map_tasks, run.display.progress, run.log)
    if run.pool is not None and isinstance(ray, JoinedRay):
        run.log(f"tasks by machine: {run.pool.with_names(ray.shares)}")
    return metrics


def _supervise(run: JobRunner, stage: str, ray: RaySession) -> dict[str, float]:
    """Run a stage in its group of processes and show its events."""
    compiles = stage in TRAINING and run.job.model.compile
    feed = DisplayFeed(
        run.run_dir.events(stage),
        run.display,
        compiles=compiles,
        goodput=run.timeline.goodput if run.timeline and stage in TRAINING else None,
    )
    if stage not in TRAINING:  # these write no events that could show progress
        run.display.phase("running")

    def poll() -> int:
        feed.poll()
        return feed.highest_step

    saves_first = run.stop.after_step() if stage in TRAINING else contextlib.nullcontext()
    with saves_first:
        watch = Watch(
            stop=run.stop,
            poll=poll,
            check=ray.check,
            log=run.log,
            phase=run.phase,
            failures=run.run_state.stage(stage).failures,
            count_failures=lambda failures: run.run_state.count_failures(stage, failures),
            pool=run.pool,
        )
        with watched_disk(run.run_dir, run.log):
            metrics = run_supervised(
                stage_fn(run.job, stage, run.run_dir), placement(run.job, stage, run.run_dir), watch
            )
    # Show the events that the stage wrote after the supervisor's last poll.
    poll()
    return metrics
