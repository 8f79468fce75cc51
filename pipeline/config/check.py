"""Checks a validated job for combinations that cannot work, before anything starts (C5, C7).

The schema checks values one by one; these checks compare them with each other, with the number of
processes and with the results of an earlier run. All problems are reported together.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.config.checks.checker import Checker
from pipeline.config.checks.cluster import check_cluster
from pipeline.config.checks.data import (
    check_datasets,
    check_prepared_names,
    check_training_images,
)
from pipeline.config.checks.hardware import check_compiler, check_driver, check_memory
from pipeline.config.checks.selection import check_selection
from pipeline.config.checks.stages import check_evaluation, check_used_data, check_weights
from pipeline.config.checks.training import check_model, check_training
from pipeline.config.job_queries import ORDER, TRAINING, stage_names, train_config
from pipeline.config.machine import Hardware
from pipeline.config.schema import Job
from pipeline.config.yaml_tree.diagnostics import raise_problems
from pipeline.layout import RunDir


def check(
    job: Job,
    world_size: int,
    origins: Mapping[str, str] | None = None,
    run_dir: RunDir | None = None,
    hardware: Hardware | None = None,
) -> None:
    """Check a job for ``world_size`` processes.

    Args:
        origins: of a LoadedJob; they turn keys into file:line.
        run_dir: stages may use the results of an earlier run in this directory.
        hardware: the machine that will run the job; None if it is not known (a rehearsal's job).

    Raises:
        ConfigError: names every problem.
    """
    checker = Checker(job, origins or {}, run_dir)
    stages = stage_names(job)
    if not stages:
        checker.report("stages", "the job has no stage", f"write one of {', '.join(ORDER)}")
    # First the values of each section, then the connections between stages. The problems appear in
    # the message in this order.
    check_model(checker)
    check_cluster(checker)
    check_datasets(checker)
    check_prepared_names(checker)
    check_training_images(checker)
    for stage in TRAINING:
        if stage in stages:
            check_training(checker, stage, train_config(job, stage), world_size)
            if hardware is not None and hardware.device_bytes is not None:
                check_memory(checker, stage, world_size, hardware.device_bytes)
    check_weights(checker)
    check_used_data(checker)
    check_selection(checker)
    check_evaluation(checker)
    if hardware is not None:
        check_driver(checker, hardware)
        check_compiler(checker, hardware)
    raise_problems(checker.problems)
