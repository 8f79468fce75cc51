"""What each stage reads and leaves behind: paths and digests, by which the ledger knows whether anything changed."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import job_queries
from pipeline.config.job_queries import TRAINING, prepared_names
from pipeline.config.schema import DatasetConfig, Job
from pipeline.data.shards import index_path
from pipeline.errors import StageError
from pipeline.files import file_digest, json_digest
from pipeline.layout import CLASSES_JSON, DATASET_JSON, WEIGHTS_JSON, RunDir
from pipeline.orchestrate.run_state import Artifact
from pipeline.sources.digest import source_digest

NOT_THERE = "not there"  # in place of a digest


def stage_dirs(run_dir: RunDir, stage: str) -> list[Path]:
    """Everything that a stage writes, its logs aside."""
    own = [run_dir.stage(stage), run_dir.checkpoints(stage), run_dir.tensorboard(stage)]
    return [*own, run_dir.export] if stage == "export" else own


def inputs(job: Job, stage: str, run_dir: RunDir) -> dict[str, str]:
    """Digests of what a stage reads, by name; ``NOT_THERE`` where it is missing."""
    if stage == "prepare":
        return {f"data.{name}": _source_digest(job.data[name]) for name in prepared_names(job)}
    data = run_dir.dataset(_dataset(job, stage)) / DATASET_JSON
    found = {"data": _digest(data)}
    initial = getattr(job_queries.stage_config(job, stage), "initial", "")
    if initial:
        weights = run_dir.weights(initial) if initial in TRAINING else Path(initial)
        found["weights"] = _digest(weights)
    if stage not in TRAINING and initial in TRAINING and getattr(job.stages, initial) is not None:
        train = job_queries.train_config(job, initial)  # decides the preprocessing
        found["preprocessing"] = json_digest([train.image_size, train.eval_resize])
    return found


def require(job: Job, stage: str, found: dict[str, str]) -> None:
    """Raise a StageError that says how to make the input that is missing."""
    missing = [name for name, digest in found.items() if digest == NOT_THERE]
    if (
        not missing or stage == "prepare"
    ):  # preparation itself tells best what is wrong with a source
        return
    if "data" in missing:
        cause, maker = f"the dataset '{_dataset(job, stage)}' is not prepared", "prepare"
    else:
        maker = str(getattr(job_queries.stage_config(job, stage), "initial", ""))
        cause = f"the weights of '{maker}' are not there"
    remedy = (
        f"run it first: --stage {maker}"
        if maker in job_queries.stage_names(job)
        else "add the stage, or correct `from`"
    )
    raise StageError(cause, place=f"stages.{stage}", remedy=remedy)


def outputs(job: Job, stage: str, run_dir: RunDir) -> dict[str, Artifact]:
    """The files that a finished stage has left, by path relative to the run's directory."""
    known: dict[Path, str] = {}
    if stage == "prepare":
        for name in prepared_names(job):
            known |= _prepared(run_dir.dataset(name))
    elif stage in TRAINING:
        weights = run_dir.weights(stage)
        known = dict.fromkeys((weights, weights.with_name(WEIGHTS_JSON)), "")
    elif stage == "export":
        known = {path: "" for path in sorted((run_dir.export).rglob("*")) if path.is_file()}
    return {
        str(path.relative_to(run_dir.path)): Artifact.of(path, digest or None)
        for path, digest in known.items()
    }


def _source_digest(config: DatasetConfig) -> str:
    """Digest of a dataset's source: of the settings if it is synthetic, else of its folder."""
    if config.synthetic is not None:
        return json_digest(config.synthetic.model_dump(mode="json"))
    return source_digest(config) or NOT_THERE


def _prepared(directory: Path) -> dict[Path, str]:
    """Files of a prepared dataset with the digests that its description knows, so that terabytes are not read again."""
    description = json.loads((directory / DATASET_JSON).read_text())
    known = {directory / DATASET_JSON: "", directory / CLASSES_JSON: ""}
    for split in description["splits"].values():
        for shard in split["shards"]:
            path = directory / shard["file"]
            known |= {path: shard["digest"], index_path(path): shard["index_digest"]}
    return known


def _dataset(job: Job, stage: str) -> str:
    return job_queries.dataset_name(job, stage)


def _digest(path: Path) -> str:
    return file_digest(path) if path.is_file() else NOT_THERE
