"""Maps each stage to the function that its processes run and to its placement.

The functions import their room when they run: the driver needs neither torch nor DeepSpeed.
"""

from __future__ import annotations

from functools import partial

from pipeline.config import machine
from pipeline.config.job_queries import TRAINING
from pipeline.config.schema import Job
from pipeline.layout import RunDir
from pipeline.orchestrate.placement import Placement
from pipeline.orchestrate.worker import StageFn
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.rank_link import RankLink


def stage_fn(job: Job, stage: str, run_dir: RunDir) -> StageFn:
    """The function that each process of a stage runs."""
    if stage in TRAINING:
        return partial(_train, job, stage, run_dir)
    if stage == "evaluate":
        return partial(_evaluate, job, run_dir)
    return partial(_export, job, run_dir)


def placement(job: Job, stage: str, run_dir: RunDir) -> Placement:
    """Processes, threads and devices of a stage, and what a stop request means for it.

    Export runs in one process on the CPU. Only training has something to save when it is stopped.
    """
    # Export writes a few files and compares two forward passes: more processes would not help.
    single = stage == "export"
    cluster = job.cluster
    return Placement(
        stage=stage,
        processes=1 if single else machine.world_size(cluster),
        threads=None if single or cluster.threads == "auto" else cluster.threads,
        device="cpu" if single else machine.device(cluster),
        run_dir=run_dir,
        single=single,
        stop_grace_s=float(cluster.grace) if stage in TRAINING else 0.0,
        # An export gives no sign of progress, and may take long.
        hang_timeout_s=0.0 if single else float(cluster.hang_timeout),
        standby_after_s=float(cluster.standby_after) if stage in TRAINING else 0.0,
        interface=cluster.network.interface,
        variables=cluster.network.environment,
    )


def _train(
    job: Job, stage: str, run_dir: RunDir, dist_env: DistEnv, link: RankLink
) -> dict[str, float]:
    from pipeline.train.trainer import train_stage

    return train_stage(job, stage, run_dir, dist_env, link)


def _evaluate(job: Job, run_dir: RunDir, dist_env: DistEnv, link: RankLink) -> dict[str, float]:
    from pipeline.evaluate.classify import evaluate_stage

    return evaluate_stage(job, run_dir, dist_env, link)


def _export(job: Job, run_dir: RunDir, dist_env: DistEnv, link: RankLink) -> dict[str, float]:
    from pipeline.export.stage import export_stage

    return export_stage(job, run_dir)
