"""What a command about prepared data is about: by a job file, a run's name or directory, or a dataset's directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import resolve
from pipeline.config.load import load_job
from pipeline.config.schema import AugmentConfig, Job, TrainConfig
from pipeline.data.sheet import Settings
from pipeline.errors import ConfigError, DataError
from pipeline.orchestrate.artifacts import dataset_dir

JOB = "run.yaml"  # of a run's directory
DEFAULTS = Settings(TrainConfig.model_fields["image_size"].default, AugmentConfig(), 0)


@dataclass(frozen=True)
class Subject:
    """A prepared dataset and how a stage trains on it; ``stage`` is '' where no job tells."""

    dataset: Path
    stage: str
    settings: Settings


def find(what: Path, runs: Path, stage: str = "") -> Subject:
    """The dataset that ``what`` names, with the settings of ``stage`` (default: the first one that trains on it).

    Raises:
        ConfigError: the job has no such stage. DataError: nothing of this kind is there.
    """
    place = next((path for path in (what, runs / what) if path.exists()), what)
    if place.is_file():
        job = load_job(place, []).job
        return _of_job(job, runs / job.name, stage)
    if (place / JOB).is_file():
        return _of_job(load_job(place / JOB, []).job, place, stage)
    if (place / "dataset.json").is_file():
        return _of_dataset(place.absolute(), stage)
    known = sorted(path.parent.name for path in runs.glob(f"*/{JOB}"))
    remedy = f"a job file, a run or a prepared dataset; runs here: {', '.join(known) or 'none'}"
    raise DataError("is no job file, run or prepared dataset", place=str(what), remedy=remedy)


def _of_dataset(dataset: Path, stage: str) -> Subject:
    """A dataset inside a run's directory is shown as that run trains on it."""
    run_dir = dataset.parent.parent.parent
    if (run_dir / JOB).is_file() and dataset == dataset_dir(run_dir, dataset.name):
        job = load_job(run_dir / JOB, []).job
        if not stage:
            stage = next((one for one in _training(job) if resolve.dataset_name(job, one) == dataset.name), "")
        if stage:
            return Subject(dataset, stage, _settings(job, stage))
    if stage:
        cause = f"no job here tells of a stage '{stage}'"
        raise ConfigError(cause, place=str(dataset), remedy="name the job file or the run instead")
    return Subject(dataset, "", DEFAULTS)


def _of_job(job: Job, run_dir: Path, stage: str) -> Subject:
    stage = stage or next(iter(_training(job)), "")
    if stage:
        return Subject(dataset_dir(run_dir, resolve.dataset_name(job, stage)), stage, _settings(job, stage))
    return Subject(dataset_dir(run_dir, next(iter(job.data))), "", DEFAULTS)


def _training(job: Job) -> list[str]:
    return [name for name in resolve.stage_names(job) if name in resolve.TRAINING]


def _settings(job: Job, stage: str) -> Settings:
    config = resolve.train_config(job, stage)
    return Settings(config.image_size, config.augment, job.seed)
