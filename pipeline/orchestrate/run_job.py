"""Runs a job, or one training stage in this process: the work behind the commands run and train."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from pipeline.config import machine, render
from pipeline.config.check_on_machine import check_on_machine
from pipeline.config.load import LoadedJob
from pipeline.config.micro_batch import choose_micro_batches
from pipeline.errors import Interrupted
from pipeline.layout import RunDir
from pipeline.metric_text import metric_text
from pipeline.monitor.console import Display, DisplayFeed, output_console, polled_in_background
from pipeline.orchestrate.job_runner import open_run, run_stages
from pipeline.orchestrate.mirror import Mirror, mirrored
from pipeline.orchestrate.run_lock import run_lock
from pipeline.orchestrate.signals import StopRequest
from pipeline.orchestrate.summary import summarise
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.rank_link import RankLink


def dry_run(loaded: LoadedJob, run_dir: RunDir) -> str:
    """Check a job; return its resolved values and what would run. Starts nothing.

    Raises:
        ConfigError: the job cannot work.
    """
    return render.dry_run(check_on_machine(loaded, run_dir))


def run_job(
    loaded: LoadedJob, run_dir: RunDir, stages: Sequence[str] = (), *, force: bool = False
) -> None:
    """Run all stages of a job, or only ``stages``; print a summary. Raises as ``run_stages``."""
    console = output_console()
    grace_s = float(loaded.job.cluster.grace)
    with (
        open_run(loaded, run_dir, console) as run,
        mirrored(Mirror.of(loaded.job, run_dir), run.log, grace_s),
    ):
        for note in run.loaded.notes:
            run.log(note)
        try:
            run_stages(run, stages, force=force)
        except Interrupted as error:
            # With --force, the same command would start from scratch once more.
            remedy = "rerun without --force to resume" if force else error.remedy
            raise Interrupted(error.cause, place=error.place, remedy=remedy) from error
        summarise(run)


def train_in_this_process(loaded: LoadedJob, stage: str, run_dir: RunDir) -> None:
    """Train one stage in this process, alone or as one rank of torchrun's. Needs no Ray.

    Raises:
        ConfigError: the job cannot work, or another process is working on the run.
        Interrupted: stopped on request, after a checkpoint.
    """
    from pipeline.train.trainer import train_stage

    dist_env = DistEnv.from_environment()
    display = Display(Console(highlight=False))
    stop = StopRequest(lambda text: display.log(text, "warning"))
    stop.install()
    link = RankLink(stop)
    # Rank 0 alone checks the job, holds the lock and shows the progress. If it refuses the job, it
    # exits with an error, upon which torchrun ends the other ranks.
    if not dist_env.is_main:
        # The same choice as rank 0 makes below: it depends on the job and the machine only.
        device_bytes = machine.hardware(loaded.job.cluster).device_bytes
        loaded = choose_micro_batches(loaded, dist_env.size, device_bytes)
        with stop.after_step():
            train_stage(loaded.job, stage, run_dir, dist_env, link)
        return
    loaded = check_on_machine(loaded, run_dir, world_size=dist_env.size)
    feed = DisplayFeed(run_dir.events(stage), display, compiles=loaded.job.model.compile)
    with (
        run_lock(run_dir),
        display.stage(stage),
        polled_in_background(feed),
        stop.after_step(),
    ):
        metrics = train_stage(loaded.job, stage, run_dir, dist_env, link)
    display.log("  ".join(metric_text(name, value) for name, value in metrics.items()))
