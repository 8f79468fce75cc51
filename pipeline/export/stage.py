"""The export stage: weights, description, preprocessing and class names in one folder.

The stage checks its own result: a fresh process loads the exported files and must reproduce the
training network's logits bit for bit.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError

import pipeline
from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.weights import weights_of
from pipeline.checkpoint.weights_file import write_weights_file
from pipeline.config import job_queries
from pipeline.config.export_formats import FORMATS
from pipeline.config.load import plain_values
from pipeline.config.schema import Job
from pipeline.data.dataset import PreparedDataset
from pipeline.data.job_dataset import open_job_dataset
from pipeline.errors import ConfigError, StageError
from pipeline.evaluate.network import load_network, preprocessing, require_same_classes
from pipeline.evaluate.record import EvaluationRecord
from pipeline.export import official
from pipeline.export.formats import write_formats
from pipeline.export.reload import ModelDescription, describe_preprocessing
from pipeline.files import atomic, with_digest, write_json
from pipeline.layout import (
    FORMAT_FOLDERS,
    MODEL_JSON,
    MODEL_WEIGHTS,
    PUBLISHED_WEIGHTS,
    SELF_TEST,
    RunDir,
)
from pipeline.model import Network

# Metrics of the training that describe the model. Its throughput describes the machine.
MODEL_METRICS = (
    *("loss", "top1", "top5", "steps"),
    *("kept_step", "selection_top1", "validation_top1"),  # of `keep: best`
)
SELF_TEST_SIZE = 224  # pixels at most: a larger image takes longer and tests nothing more
WRITE_ERRORS = (
    OSError,
    SafetensorError,
    RuntimeError,
)  # torch.save: RuntimeError if a disk is full


def export_stage(job: Job, run_dir: RunDir) -> dict[str, float]:
    """Write ``export/``: model.safetensors, model.json, selftest.safetensors, and the formats.

    revcol.pth has the published names. It is written if the published code has such a network;
    otherwise model.json says why it is not there. A format whose packages are not installed is
    left out.

    Returns:
        ``parameters``, ``bytes`` and ``reload_difference`` (0: in a fresh process, the logits are
        equal bit for bit), and ``<format>_missing`` for a format that is left out.

    Raises:
        StageError: the files cannot be written, or fail the self-test.
    """
    stage = job.stages.export
    if stage is None:
        raise ConfigError("the job has no stage 'export'", remedy="add it under `stages`")
    data = open_job_dataset(job, run_dir, "export")
    require_same_classes(run_dir, stage.initial, data)
    network = load_network(job, run_dir, stage.initial, data)
    description = _describe(job, run_dir, network, data)
    target = run_dir.export
    try:
        _write(network, description, target)
    except WRITE_ERRORS as error:
        raise StageError(
            f"the export cannot be written: {error}",
            place=str(target),
            remedy="free some disk space, then rerun the same command",
        ) from error
    difference = _self_test_in_fresh_process(target)
    for folder in FORMAT_FOLDERS:  # of an earlier export
        shutil.rmtree(target / folder, ignore_errors=True)
    # Known since before the first stage, when the user was told: the rest is exported.
    missing = [name for name in stage.formats if FORMATS[name].missing]
    write_formats(
        target,
        [name for name in stage.formats if name not in missing],
        lambda text, level="info": print(text, flush=True),
        hub_precision=stage.hub_precision,
    )
    return {
        "parameters": float(sum(parameter.numel() for parameter in network.parameters())),
        "bytes": float((target / MODEL_WEIGHTS).stat().st_size),
        "reload_difference": difference,
        **{f"{name}_missing": 1.0 for name in missing},
    }


def _describe(
    job: Job, run_dir: RunDir, network: Network, data: PreparedDataset
) -> ModelDescription:
    """The content of model.json."""
    stage = job.stages.export
    assert stage is not None
    weights = weights_of(run_dir, stage.initial)
    trained = WeightsDescription.read(*weights)
    orientation = str(data.description.settings.get("exif_orientation", "ignore"))
    description: ModelDescription = {
        "network": asdict(network.spec),
        "preprocessing": describe_preprocessing(
            preprocessing(job, run_dir, stage.initial), orientation
        ),
        "classes": data.classes,
        "class_names": data.class_names,
        "trained": {
            name: value for name, value in trained.metrics.items() if name in MODEL_METRICS
        },
        "name": job.name,
        "data": job_queries.dataset_name(job, "export"),
        "job": _training(job),
        "published_names": _published_names(network, stage.formats),
        "pipeline": pipeline.__version__,
    }
    evaluation = EvaluationRecord.read(run_dir)
    # Only of these weights: a job may evaluate other ones than it exports.
    if evaluation is not None and evaluation.weights == weights.digest():
        description["evaluated"] = evaluation.summary()
    return description


def _published_names(network: Network, formats: list[str]) -> str:
    missing = official.not_published(network.spec)
    if missing:
        return f"no file: the published code has no {missing}"
    return PUBLISHED_WEIGHTS if "published" in formats else "no file: not among the formats"


def _training(job: Job) -> str:
    """The model and the training stages, as a job file has them, but without paths."""
    values = plain_values(job)
    stages = {
        name: {
            key: Path(value).name if key == "from" else value
            for key, value in values["stages"][name].items()
        }
        for name in job_queries.training_stages(job)
    }
    shown = {"name": job.name, "model": values["model"], "stages": stages}
    return str(yaml.safe_dump(shown, sort_keys=False))


def _write(network: Network, description: ModelDescription, target: Path) -> None:
    state = network.state_dict()
    write_weights_file(target / MODEL_WEIGHTS, state, metadata={"format": "pt"})
    if description["published_names"] == PUBLISHED_WEIGHTS:
        published = official.to_published(network, state)
        # An open file instead of a path: torch.save would store the (temporary) file name.
        with atomic(target / PUBLISHED_WEIGHTS) as file:
            torch.save({"model": published}, file)
    else:
        (target / PUBLISHED_WEIGHTS).unlink(missing_ok=True)  # of another network
    write_json(target / MODEL_JSON, with_digest(description))
    _write_self_test(
        network, min(SELF_TEST_SIZE, description["preprocessing"]["image_size"]), target
    )


@torch.no_grad()
def _write_self_test(network: Network, image_size: int, target: Path) -> None:
    """Write two random images and the network's logits for them."""
    # One thread, because the order of floating-point sums depends on the number of threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    logits = network(images).logits[-1]
    torch.set_num_threads(threads)
    write_weights_file(target / SELF_TEST, {"images": images, "logits": logits})


def _self_test_in_fresh_process(target: Path) -> float:
    """Largest difference of logits, which the self-test of ``pipeline.export.reload`` prints."""
    command = [sys.executable, "-m", "pipeline.export.reload", str(target)]
    root = Path(pipeline.__file__).parents[1]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    if completed.returncode != 0:
        raise StageError(
            "the exported model does not reproduce the training network's logits: "
            f"{completed.stdout.strip()} {completed.stderr[-2000:]}",
            place=str(target),
            remedy="do not use this export, and report the error",
        )
    return float(json.loads(completed.stdout.strip().splitlines()[-1])["difference"])
