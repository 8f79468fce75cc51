"""Check that a stage that keeps its best weights has images to choose them on."""

from __future__ import annotations

import os

from pipeline.config.checks.checker import Checker
from pipeline.config.job_queries import (
    dataset_name,
    prepared_names,
    train_config,
    training_stages,
)
from pipeline.config.schema import DatasetConfig
from pipeline.errors import ConfigError
from pipeline.sources.class_order import visible_entries
from pipeline.sources.class_survey import class_like
from pipeline.sources.remote import open_storage
from pipeline.sources.splits import divide


def check_selection(checker: Checker) -> None:
    """Report every ``keep: best`` whose dataset has no split that may choose.

    A dataset that this job does not prepare is left to the stage itself, which refuses before its
    first step: its description lies beside its shards.
    """
    job = checker.job
    for stage in training_stages(job):
        if train_config(job, stage).keep != "best":
            continue
        try:
            name = dataset_name(job, stage)
        except ConfigError:
            continue  # already reported
        if name not in job.data or name not in prepared_names(job):
            continue
        dataset = job.data[name]
        if not dataset.selection_fraction and not _may_have_test_split(dataset):
            cause = f"{name} reports the accuracy on its only validation images, so these cannot"
            remedy = f"data.{name}.selection_fraction: 0.1 holds some out, or keep: last"
            checker.report(f"stages.{stage}.keep", f"{cause} choose the best weights", remedy)


def _may_have_test_split(dataset: DatasetConfig) -> bool:
    """False if the source certainly has no test split beside a validation split."""
    if dataset.synthetic is not None:
        return False
    # Only preparation looks into object stores and Hugging Face datasets.
    if dataset.layout == "huggingface" or not os.path.isdir(dataset.root):
        return True
    storage, root = open_storage(dataset.root)
    present = class_like(visible_entries(storage, root))
    return "test" in divide(dataset.splits, list(present)).splits
