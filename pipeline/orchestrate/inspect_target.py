"""Finds the prepared dataset that a command inspects: from a job, a run, or the dataset itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import job_queries
from pipeline.config.load import load_job
from pipeline.config.schema import AugmentConfig, Job, TrainConfig
from pipeline.data.contact_sheet import Settings
from pipeline.errors import ConfigError, DataError
from pipeline.layout import DATASET_JSON, RunDir
from pipeline.orchestrate.job_files import find_job_file, shipped_jobs

DEFAULTS = Settings(TrainConfig.model_fields["image_size"].default, AugmentConfig(), 0)


@dataclass(frozen=True)
class InspectTarget:
    """A prepared dataset and how a stage trains on it; ``stage`` is '' if no job is known."""

    dataset: Path
    stage: str
    settings: Settings


def find(target: Path, runs: Path, stage: str = "", overrides: Sequence[str] = ()) -> InspectTarget:
    """The dataset that ``target`` names, with the settings of ``stage``.

    Args:
        target: path of a job file, a run directory or a dataset; name of a run or a shipped job.
        runs: folder of the runs.
        stage: a training stage; default: the first one that trains on the dataset.
        overrides: settings to show instead of those of the job or run, as KEY=VALUE.

    Raises:
        ConfigError: the job has no such stage, or an override does not fit.
        DataError: ``target`` names nothing of this kind.
    """
    # A path wins over the name of a run, and that over the name of a shipped job: the run directory
    # has the settings that were really used.
    path = next((path for path in (target, runs / target) if path.exists()), target)
    if not path.exists() and str(target) in shipped_jobs():
        path = find_job_file(str(target))
    # 1. A job file: the dataset lies in the run directory of its name.
    if path.is_file():
        job = load_job(path, overrides).job
        return _of_job(job, RunDir(runs / job.name), stage)
    # 2. A run directory.
    run_dir = RunDir(path)
    if run_dir.run_yaml.is_file():
        job = load_job(run_dir.run_yaml, overrides, migrate=True).job
        return _of_job(job, run_dir, stage)
    # 3. A prepared dataset, perhaps inside a run directory.
    if (path / DATASET_JSON).is_file():
        return _of_dataset(path.absolute(), stage, overrides)
    known = sorted(path.name for path in runs.glob("*") if RunDir(path).run_yaml.is_file())
    raise DataError(
        "is no job file, run or prepared dataset",
        place=str(target),
        remedy=f"runs here: {', '.join(known) or 'none'}; "
        f"shipped jobs: {', '.join(shipped_jobs())}",
    )


def _of_dataset(dataset: Path, stage: str, overrides: Sequence[str]) -> InspectTarget:
    """A dataset inside a run directory has the settings with which this run trains on it."""
    run_dir = RunDir(dataset.parent.parent.parent)  # <run>/stages/prepare/<dataset>
    if run_dir.run_yaml.is_file() and dataset == run_dir.dataset(dataset.name):
        job = load_job(run_dir.run_yaml, overrides, migrate=True).job
        stage = stage or _stage_that_trains_on(job, dataset.name)
        if stage:
            return InspectTarget(dataset, stage, _settings(job, stage))
    if stage or overrides:
        unknown = f"the stage '{stage}'" if stage else f"the setting {overrides[0]}"
        raise ConfigError(
            f"no job is known that has {unknown}",
            place=str(dataset),
            remedy="name the job file or the run instead",
        )
    return InspectTarget(dataset, "", DEFAULTS)


def _of_job(job: Job, run_dir: RunDir, stage: str) -> InspectTarget:
    stage = stage or next(iter(job_queries.training_stages(job)), "")
    if not stage:
        return InspectTarget(_local(job, run_dir, next(iter(job.data))), "", DEFAULTS)
    dataset = _local(job, run_dir, job_queries.dataset_name(job, stage))
    return InspectTarget(dataset, stage, _settings(job, stage))


def _local(job: Job, run_dir: RunDir, name: str) -> Path:
    """The folder of a dataset. Raises DataError if it lies behind a URL."""
    place = job_queries.dataset_place(job, run_dir, name)
    if isinstance(place, Path):
        return place
    raise DataError("is not on this machine", place=place, remedy="copy it into a folder")


def _stage_that_trains_on(job: Job, dataset: str) -> str:
    """The first training stage that uses the dataset, or ''."""
    stages = job_queries.training_stages(job)
    return next((name for name in stages if job_queries.dataset_name(job, name) == dataset), "")


def _settings(job: Job, stage: str) -> Settings:
    config = job_queries.train_config(job, stage)
    return Settings(config.image_size, config.augment, job.seed)
