"""What a command about prepared data is about: by a job file, a run's name or directory, or a dataset's directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import job_queries
from pipeline.config.load import load_job
from pipeline.config.schema import AugmentConfig, Job, TrainConfig
from pipeline.data.contact_sheet import Settings
from pipeline.errors import ConfigError, DataError
from pipeline.layout import DATASET_JSON, RunDir

DEFAULTS = Settings(TrainConfig.model_fields["image_size"].default, AugmentConfig(), 0)


@dataclass(frozen=True)
class InspectTarget:
    """A prepared dataset and how a stage trains on it; ``stage`` is '' where no job tells."""

    dataset: Path
    stage: str
    settings: Settings


def find(what: Path, runs: Path, stage: str = "") -> InspectTarget:
    """The dataset that ``what`` names, with the settings of ``stage`` (default: the first one that trains on it).

    Raises:
        ConfigError: the job has no such stage. DataError: nothing of this kind is there.
    """
    place = next((path for path in (what, runs / what) if path.exists()), what)
    if place.is_file():
        job = load_job(place, []).job
        return _of_job(job, RunDir(runs / job.name), stage)
    run_dir = RunDir(place)
    if run_dir.run_yaml.is_file():
        return _of_job(load_job(run_dir.run_yaml, [], migrate=True).job, run_dir, stage)
    if (place / DATASET_JSON).is_file():
        return _of_dataset(place.absolute(), stage)
    known = sorted(path.name for path in runs.glob("*") if RunDir(path).run_yaml.is_file())
    remedy = f"a job file, a run or a prepared dataset; runs here: {', '.join(known) or 'none'}"
    raise DataError("is no job file, run or prepared dataset", place=str(what), remedy=remedy)


def _of_dataset(dataset: Path, stage: str) -> InspectTarget:
    """A dataset inside a run's directory is shown as that run trains on it."""
    run_dir = RunDir(dataset.parent.parent.parent)
    if run_dir.run_yaml.is_file() and dataset == run_dir.dataset(dataset.name):
        job = load_job(run_dir.run_yaml, [], migrate=True).job
        if not stage:
            stage = next(
                (
                    one
                    for one in _training(job)
                    if job_queries.dataset_name(job, one) == dataset.name
                ),
                "",
            )
        if stage:
            return InspectTarget(dataset, stage, _settings(job, stage))
    if stage:
        cause = f"no job here tells of a stage '{stage}'"
        raise ConfigError(cause, place=str(dataset), remedy="name the job file or the run instead")
    return InspectTarget(dataset, "", DEFAULTS)


def _of_job(job: Job, run_dir: RunDir, stage: str) -> InspectTarget:
    stage = stage or next(iter(_training(job)), "")
    if stage:
        return InspectTarget(
            run_dir.dataset(job_queries.dataset_name(job, stage)), stage, _settings(job, stage)
        )
    return InspectTarget(run_dir.dataset(next(iter(job.data))), "", DEFAULTS)


def _training(job: Job) -> list[str]:
    return [name for name in job_queries.stage_names(job) if name in job_queries.TRAINING]


def _settings(job: Job, stage: str) -> Settings:
    config = job_queries.train_config(job, stage)
    return Settings(config.image_size, config.augment, job.seed)
