"""Lists the inputs and outputs of each stage, and tells by digests whether they have changed."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.checkpoint.description import EARLIER_RESIZE
from pipeline.checkpoint.weights_source import source_in_run
from pipeline.config import job_queries
from pipeline.config.job_queries import TRAINING, dataset_place, prepared_names
from pipeline.config.schema import DatasetConfig, Job
from pipeline.data.description import DatasetDescription
from pipeline.data.local_shards import PREPARE_AGAIN
from pipeline.data.remote_shards import read_description
from pipeline.data.shards import index_path
from pipeline.errors import DataError, StageError
from pipeline.files import file_digest, json_digest
from pipeline.layout import (
    CLASSES_JSON,
    DATASET_JSON,
    EXPORT_FILES,
    FORMAT_FOLDERS,
    WEIGHTS_FILE,
    WEIGHTS_JSON,
    RunDir,
)
from pipeline.orchestrate.run_state import Artifact, RunState, StageRecord
from pipeline.sources.digest import source_digest

NOT_THERE = "not there"  # in place of the digest of a missing input; also stored in run.json
NEW = "new"  # in place of a digest: an earlier stage of this call will write the input
UNKNOWN = "unknown"  # in place of a digest: it is known only after an earlier stage of this call

# Files that are judged by size and time: a run would read terabytes at every start.
_LARGE = ".parquet"


def stage_dirs(run_dir: RunDir, stage: str) -> list[Path]:
    """The folders that a stage writes, except its logs."""
    folders = [
        run_dir.stage(stage),
        run_dir.checkpoints(stage),
        run_dir.captures(stage),
        run_dir.tensorboard(stage),
    ]
    if stage == "export":
        folders.append(run_dir.export)
    return folders


def inputs(
    job: Job, stage: str, run_dir: RunDir, expected: Mapping[Path, str] | None = None
) -> dict[str, str]:
    """Digests of the inputs of a stage, by name; ``NOT_THERE`` for a missing one.

    Example, for finetune from pretrain: {"dataset": fingerprint of the prepared dataset, "weights":
    digest of the weights of pretrain}. Only content counts: names and paths may change.

    Args:
        expected: digests of datasets (by their directory) and weights (by their file) that are
            known without reading them, for example because a stage is about to write them.

    Raises:
        DataError: the description of a dataset is damaged.
    """
    if stage == "prepare":
        return {f"data.{name}": _source_digest(job.data[name]) for name in prepared_names(job)}
    expected = expected or {}
    # The fingerprint covers everything that the shards' bytes depend on. A digest of dataset.json
    # would not do: the file also records versions of libraries and limits such as max_rejected.
    dataset = dataset_place(job, run_dir, _dataset(job, stage))
    known = expected.get(dataset) if isinstance(dataset, Path) else None
    digests = {"dataset": known or fingerprint(dataset)}
    initial = _initial(job, stage)
    if initial:
        # `from` names a stage of this run or a file; the file may come from anywhere.
        weights = source_in_run(run_dir, initial)
        is_there = weights.path.is_file()
        known = expected.get(weights.path)
        digests["weights"] = known or (weights.digest() if is_there else NOT_THERE)
    if stage not in TRAINING and initial in TRAINING and getattr(job.stages, initial) is not None:
        # Evaluation and export preprocess images as the training stage did.
        train = job_queries.train_config(job, initial)
        mode = EARLIER_RESIZE.get(train.preprocessing, train.preprocessing)
        digests["preprocessing"] = json_digest([train.image_size, mode])
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
    if "dataset" in missing:
        name = _dataset(job, stage)
        if name in job.data and job.data[name].prepared:
            raise StageError(
                f"{job.data[name].prepared} holds no prepared dataset",
                place=f"data.{name}.prepared",
                remedy="correct the path, or mount the file system",
            )
        producer = "prepare"
        cause = f"the dataset '{name}' is not prepared"
    else:
        producer = _initial(job, stage)
        cause = f"the weights of '{producer}' are missing"
    if producer in job_queries.stage_names(job):
        remedy = f"run this stage first: rerun the same command with --stage {producer}"
    else:
        remedy = "add the stage, or correct `from`"
    raise StageError(cause, place=f"stages.{stage}", remedy=remedy)


def require_intact(
    job: Job, stage: str, run_dir: RunDir, run_state: RunState, judged: Sequence[str]
) -> None:
    """Check the files that a stage reads from finished stages that are not ``judged`` themselves.

    A flipped bit in a small file would be used silently: it changes neither size nor time.

    Raises:
        StageError: a file is not as its stage wrote it.
        CheckpointError: a weights file from elsewhere is damaged.
    """
    source = _initial(job, stage)
    if source.endswith(Path(WEIGHTS_FILE).suffix) and Path(source).is_file():
        # Weights from elsewhere: better now than after a preparation of hours. Imported here,
        # because it imports torch, which takes seconds.
        from pipeline.checkpoint.weights_file import verify_weights_file

        verify_weights_file(Path(source))
    used = {} if stage == "prepare" else {"prepare": run_dir.dataset(_dataset(job, stage))}
    if source in TRAINING:
        used[source] = run_dir.stage(source)
    for producer, folder in used.items():
        record = run_state.stage(producer)
        if producer in judged or record.state != "done":
            continue
        for path, artifact in record.outputs.items():
            file = run_dir.path / path
            is_small = file.name in (DATASET_JSON, CLASSES_JSON, WEIGHTS_FILE, WEIGHTS_JSON)
            if is_small and file.parent == folder and not artifact.matches(file):
                raise StageError(
                    f"is not the file that {producer} wrote: it is damaged or missing",
                    place=str(file),
                    remedy=f"rerun the same command with --stage {producer}: it writes the file "
                    "again",
                )


def finished_weights(run_dir: RunDir, run_state: RunState) -> dict[Path, str]:
    """The digests of the weights of finished trainings, by file."""
    digests: dict[Path, str] = {}
    for stage in TRAINING:
        path = run_dir.weights(stage)
        artifact = run_state.stage(stage).outputs.get(str(path.relative_to(run_dir.path)))
        if artifact is not None and path.is_file():
            digests[path] = artifact.digest
    return digests


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
        # Which files there are depends on the network.
        paths = [run_dir.export / name for name in EXPORT_FILES]
        for folder in FORMAT_FOLDERS:
            paths += sorted((run_dir.export / folder).rglob("*"))
        files = {path: "" for path in paths if path.is_file()}
    return {
        str(path.relative_to(run_dir.path)): Artifact.of(path, digest or None)
        for path, digest in files.items()
    }


def changed_inputs(
    record: StageRecord, now: Mapping[str, str], job: Job, stage: str, run_dir: RunDir
) -> list[str]:
    """The names of the inputs that are no longer those the stage was started with."""
    recorded = dict(record.inputs)
    # Version 0.1.0 recorded the digest of dataset.json. While that file is unchanged, its
    # fingerprint is known; else it is not compared here, and the checkpoint itself tells (K6).
    digest = recorded.pop("data", "")
    dataset = dataset_place(job, run_dir, _dataset(job, stage)) if stage != "prepare" else None
    if isinstance(dataset, Path) and digest and digest == _digest(dataset / DATASET_JSON):
        recorded["dataset"] = fingerprint(dataset)
    if not recorded:
        return []  # run.json was lost
    if dataset is not None and "dataset" not in recorded:
        now = {name: value for name, value in now.items() if name != "dataset"}
    names = dict.fromkeys([*now, *recorded])
    return [name for name in names if _differ(record, recorded.get(name), now.get(name))]


def _differ(record: StageRecord, recorded: str | None, now: str | None) -> bool:
    # The source of a finished stage is not needed any more, so it may be unmounted.
    if now == UNKNOWN or (now == NOT_THERE and record.state == "done"):
        return False
    return recorded != now


def damaged_outputs(record: StageRecord, run_dir: RunDir, *, thorough: bool) -> list[str]:
    """The outputs of a finished stage that are missing or whose content has changed.

    Args:
        thorough: read the shards too. Otherwise they count as unchanged while their size and time
            are; every other file is read.
    """
    return [
        path
        for path, artifact in record.outputs.items()
        if not artifact.matches(
            run_dir.path / path, trust_time=path.endswith(_LARGE) and not thorough
        )
    ]


def fingerprint(dataset: Path | str) -> str:
    """The fingerprint of a prepared dataset (folder or URL), ``NOT_THERE`` if there is none.

    Raises:
        DataError: dataset.json cannot be read.
    """
    if isinstance(dataset, str):
        return _remote_fingerprint(dataset)
    path = dataset / DATASET_JSON
    try:
        return str(json.loads(path.read_text())["fingerprint"])
    except FileNotFoundError:
        return NOT_THERE
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"is damaged: {error}", place=str(path), remedy=PREPARE_AGAIN) from None


@functools.cache  # asked for by every stage; the ranks compare it again when they open the data
def _remote_fingerprint(url: str) -> str:
    return read_description(url).fingerprint


def _source_digest(config: DatasetConfig) -> str:
    """Digest of a dataset's source: of the settings if it is synthetic, else of its folder."""
    if config.synthetic is not None:
        return json_digest(config.synthetic.digest_values())
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
