"""The prepare stage: every dataset of a job, made up first where the job says so."""

from __future__ import annotations

from pipeline.config import job_queries
from pipeline.config.schema import DatasetConfig, Job
from pipeline.files import json_digest
from pipeline.layout import RunDir
from pipeline.prepare.build import MapTasks, prepare_dataset
from pipeline.reporting import Log, Progress
from pipeline.synthetic import generate

TOTALS = ("images", "validation", "rejected", "duplicates", "bytes")


def prepare_stage(
    job: Job, run_dir: RunDir, tasks: MapTasks, progress: Progress, log: Log
) -> dict[str, float]:
    """Prepare the job's datasets, each in ``run_dir.dataset(name)``.

    Metrics: those of each dataset under ``<name>/``, and their sums.
    """
    metrics: dict[str, float] = {}
    for name in job_queries.prepared_names(job):
        config, target = job.data[name], run_dir.dataset(name)
        if config.synthetic is not None:
            source = target.with_name(
                f"{name}.source-{_made_from(config)}"
            )  # no dataset's name has a dot
            files = generate.plan_files(config, source)
            for done, _ in enumerate(tasks(generate.write_file, files), 1):
                progress(f"{name}: generating images", done, len(files), "")
            generate.finish_source(config, source)
            config = config.model_copy(update={"root": str(source), "synthetic": None})
        found = prepare_dataset(name, config, target, job.seed, tasks, progress, log)
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
        log(f"{name}: {_summary(found)}", "info")
    return metrics | {
        key: sum(metrics[f"{name}/{key}"] for name in job_queries.prepared_names(job))
        for key in TOTALS
    }


def _made_from(config: DatasetConfig) -> str:
    """A short digest of what made-up images depend on: other settings, another folder."""
    return json_digest(
        config.model_dump(mode="json", include={"synthetic", "classes", "layout", "min_side"})
    )[:8]


def _summary(found: dict[str, float]) -> str:
    counts = f"{found['images']:,.0f} training and {found['validation']:,.0f} validation images of {found['classes']:,.0f} classes"
    bad = f"{found['rejected']:,.0f} rejected, {found['duplicates']:,.0f} duplicates"
    return f"{counts}, {found['bytes'] / 2**20:,.1f} MiB; {bad}"
