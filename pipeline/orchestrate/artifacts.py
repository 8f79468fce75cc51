"""Lists the inputs and outputs of each stage, with digests to tell whether they have changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.config import job_queries
from pipeline.config.job_queries import TRAINING, prepared_names
from pipeline.config.schema import DatasetConfig, Job
from pipeline.data.description import DatasetDescription
from pipeline.data.shards import index_path
from pipeline.errors import StageError
from pipeline.files import file_digest, json_digest
from pipeline.layout import CLASSES_JSON, DATASET_JSON, WEIGHTS_JSON, RunDir
from pipeline.orchestrate.run_state import Artifact
from pipeline.sources.digest import source_digest

NOT_THERE = "not there"  # in place of the digest of a missing input; also stored in run.json


def stage_dirs(run_dir: RunDir, stage: str) -> list[Path]:
    """The folders that a stage writes, except its logs."""
    folders = [run_dir.stage(stage), run_dir.checkpoints(stage), run_dir.tensorboard(stage)]
    if stage == "export":
        folders.append(run_dir.export)
    return folders


def inputs(job: Job, stage: str, run_dir: RunDir) -> dict[str, str]:
    """Digests of the inputs of a stage, by name; ``NOT_THERE`` for a missing one.

    Example, for finetune from pretrain: {"data": digest of dataset.json, "weights": digest of the
    weights of pretrain}.
    """
    if stage == "prepare":
        return {f"data.{name}": _source_digest(job.data[name]) for name in prepared_names(job)}
    # dataset.json holds the digests of all shards, so its own digest stands for the whole dataset.
    digests = {"data": _digest(run_dir.dataset(_dataset(job, stage)) / DATASET_JSON)}
    initial = _initial(job, stage)
    if initial:
        # `from` names a stage of this run or a file; the file may come from anywhere.
        weights = run_dir.weights(initial) if initial in TRAINING else Path(initial)
        digests["weights"] = _digest(weights)
    if stage not in TRAINING and initial in TRAINING and getattr(job.stages, initial) is not None:
        # Evaluation and export preprocess images as the training stage did.
        train = job_queries.train_config(job, initial)
        digests["preprocessing"] = json_digest([train.image_size, train.eval_resize])
    if stage == "export" and run_dir.evaluation.is_file():
        # The export quotes the accuracy. It does without one if the job does not evaluate.
        digests["evaluation"] = _digest(run_dir.evaluation)
    return digests


def require(job: Job, stage: str, digests: Mapping[str, str]) -> None:
    """Raise a StageError that names the stage to run first, if an input is missing."""
    missing = [name for name, digest in digests.items() if digest == NOT_THERE]
    # Preparation reports a missing source itself, with more detail.
    if not missing or stage == "prepare":
        return
    if "data" in missing:
        producer = "prepare"
        cause = f"the dataset '{_dataset(job, stage)}' is not prepared"
    else:
        producer = _initial(job, stage)
        cause = f"the weights of '{producer}' are missing"
    if producer in job_queries.stage_names(job):
        remedy = f"run this stage first: --stage {producer}"
    else:
        remedy = "add the stage, or correct `from`"
    raise StageError(cause, place=f"stages.{stage}", remedy=remedy)


def outputs(job: Job, stage: str, run_dir: RunDir) -> dict[str, Artifact]:
    """The files that a finished stage has produced, by path relative to the run directory."""
    files: dict[Path, str] = {}  # digest, or '' to compute it
    if stage == "prepare":
        for name in prepared_names(job):
            files |= _prepared_files(run_dir.dataset(name))
    elif stage in TRAINING:
        # Checkpoints are no outputs: retention deletes them, and a finished stage needs none.
        weights = run_dir.weights(stage)
        files = dict.fromkeys((weights, weights.with_name(WEIGHTS_JSON)), "")
    elif stage == "evaluate":
        files = {run_dir.evaluation: ""}
    elif stage == "export":
        files = {path: "" for path in sorted(run_dir.export.rglob("*")) if path.is_file()}
    return {
        str(path.relative_to(run_dir.path)): Artifact.of(path, digest or None)
        for path, digest in files.items()
    }


def _source_digest(config: DatasetConfig) -> str:
    """Digest of a dataset's source: of the settings if it is synthetic, else of its folder."""
    if config.synthetic is not None:
        return json_digest(config.synthetic.model_dump(mode="json"))
    return source_digest(config) or NOT_THERE


def _prepared_files(directory: Path) -> dict[Path, str]:
    """Files of a prepared dataset with their digests, '' for one to compute.

    The digests of the shards come from dataset.json: computing them would read terabytes again.
    """
    files = {directory / DATASET_JSON: "", directory / CLASSES_JSON: ""}
    for shard in DatasetDescription.read(directory).shards():
        path = directory / shard.file
        files |= {path: shard.digest, index_path(path): shard.index_digest}
    return files


def _dataset(job: Job, stage: str) -> str:
    return job_queries.dataset_name(job, stage)


def _initial(job: Job, stage: str) -> str:
    """The key `from` of a stage: a training stage, a weights file, or ''."""
    return str(getattr(job_queries.stage_config(job, stage), "initial", "") or "")


def _digest(path: Path) -> str:
    return file_digest(path) if path.is_file() else NOT_THERE
