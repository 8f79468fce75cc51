"""The prepare stage: prepare every dataset of a job, generating synthetic images first."""

from __future__ import annotations

from pipeline.config import job_queries
from pipeline.config.schema import DatasetConfig, Job
from pipeline.files import json_digest
from pipeline.layout import RunDir
from pipeline.prepare.build import prepare_dataset
from pipeline.prepare.map_tasks import MapTasks
from pipeline.reporting import Log, Progress
from pipeline.synthetic import generate

SPLIT_METRICS = {  # images of a split by metric, and the split in words
    "images": "training",
    "selection": "selection",
    "validation": "validation",
    "test": "test",
}
SUMMED_METRICS = (*SPLIT_METRICS, "rejected", "duplicates", "bytes")


def prepare_stage(
    job: Job, run_dir: RunDir, tasks: MapTasks, progress: Progress, log: Log
) -> dict[str, float]:
    """Prepare the job's datasets, each in ``run_dir.dataset(name)``.

    Returns:
        The metrics of each dataset under ``<name>/``, and the sums over all datasets.
    """
    names = job_queries.prepared_names(job)
    metrics: dict[str, float] = {}
    for name in names:
        config = job.data[name]
        if config.synthetic is not None:
            config = _generate(name, config, run_dir, tasks, progress)
        dataset_metrics = prepare_dataset(
            name=name,
            config=config,
            target=run_dir.dataset(name),
            seed=job.seed,
            tasks=tasks,
            progress=progress,
            log=log,
        )
        metrics |= {f"{name}/{key}": value for key, value in dataset_metrics.items()}
        log(f"{name}: {_summary(dataset_metrics)}", "info")
    # Not every dataset has every split.
    values = {
        key: [metrics[f"{name}/{key}"] for name in names if f"{name}/{key}" in metrics]
        for key in SUMMED_METRICS
    }
    return metrics | {key: sum(counts) for key, counts in values.items() if counts}


def _generate(
    name: str, config: DatasetConfig, run_dir: RunDir, tasks: MapTasks, progress: Progress
) -> DatasetConfig:
    """Generate the source of a synthetic dataset; returns the settings that read it."""
    # The folder's name holds a digest of the settings, so other settings never mix with old images.
    # The name of a dataset cannot contain a dot, so it cannot be the name of this folder.
    source = run_dir.dataset(name).with_name(f"{name}.source-{_settings_digest(config)}")
    files = generate.plan_files(config, source)
    for done, _ in enumerate(tasks(generate.write_file, files), 1):
        progress(f"{name}: generating images", done, len(files))
    generate.finish_source(config, source)
    return config.model_copy(update={"root": str(source), "synthetic": None})


def _settings_digest(config: DatasetConfig) -> str:
    """A short digest of the settings that synthetic images depend on."""
    assert config.synthetic is not None
    settings = config.model_dump(mode="json", include={"classes", "layout", "min_side"})
    return json_digest(settings | {"synthetic": config.synthetic.digest_values()})[:8]


def _summary(metrics: dict[str, float]) -> str:
    *others, last = [
        f"{metrics[key]:,.0f} {split}" for key, split in SPLIT_METRICS.items() if key in metrics
    ]
    counts = f"{', '.join(others)} and {last}" if others else last
    size = f"{metrics['bytes'] / 2**20:,.1f} MiB"
    return (
        f"{counts} images of {metrics['classes']:,.0f} classes, {size}; "
        f"{metrics['rejected']:,.0f} rejected, {metrics['duplicates']:,.0f} duplicates"
    )
