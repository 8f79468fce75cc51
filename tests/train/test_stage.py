"""A complete training stage on a small prepared dataset: results, metrics, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.manifest import list_checkpoints
from pipeline.config.schema import Job
from pipeline.data.dataset import open_dataset
from pipeline.errors import CheckpointError, StageError
from pipeline.layout import RunDir
from pipeline.model.column import Level
from pipeline.monitor import tags
from tests.train import processes, staging

STEPS = 12
LAST_LEVEL = "columns.3.levels.3.down.conv.weight"
Pretrained = tuple[RunDir, dict[str, float]]
METRICS = {"loss", "top1", "images_per_s", "data_wait_share", "steps"}


def train(run_dir: RunDir, world_size: int, job: Job, stage: str = "pretrain") -> dict[str, float]:
    """Train with ``world_size`` processes; the metrics of rank 0."""
    results = staging.run_stage(run_dir, world_size, job, stage)
    assert all(isinstance(metrics, dict) for metrics in results), results
    for metrics in results:
        for key in ("loss", "top1", "steps"):  # each rank has rates of its own
            assert metrics[key] == results[0][key], key
    first: dict[str, float] = results[0]
    return first


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """A run pretrained with one process under ZeRO 1, and its metrics."""
    run_dir = staging.prepared_run(tmp_path_factory.mktemp("pretrained"))
    return run_dir, train(run_dir, 1, staging.job())


def assert_pretrained(run_dir: RunDir, metrics: dict[str, float]) -> None:
    assert set(metrics) == METRICS
    assert metrics["steps"] == STEPS
    description = WeightsDescription.read(run_dir.weights("pretrain"))
    assert description.weights == "master"
    assert description.step == STEPS
    assert description.metrics == metrics
    assert [event.step for event in staging.events(run_dir, "evaluation")] == [6, 12]
    # Epochs count from 1, as steps do: 4 steps each.
    assert {event.step: event.epoch for event in staging.events(run_dir, "step")}[12] == 3
    # keep_checkpoints: the last two epochs
    assert [step for step, _ in list_checkpoints(run_dir.checkpoints("pretrain"))] == [12, 8]


def assert_finetuned(run_dir: RunDir, metrics: dict[str, float]) -> None:
    assert set(metrics) == METRICS
    assert metrics["steps"] == 4
    description = WeightsDescription.read(run_dir.weights("finetune"))
    assert description.weights == "ema"
    assert description.image_size == 64
    assert description.classes == [f"c{i}" for i in range(staging.CLASSES)]
    before = staging.weights(run_dir)
    after = staging.weights(run_dir, "finetune")
    backbone = {name for name in before if not name.startswith(("classifiers", "decoders"))}
    head = {"norm.weight", "norm.bias", "linear.weight", "linear.bias"}
    assert set(after) == backbone | {f"classifiers.0.{name}" for name in head}
    loaded = f"loaded {len(backbone)} parameters from pretrain; 4 parameters of the heads are new"
    assert loaded in staging.messages(run_dir, "finetune")
    stem, last = (
        float((after[name] - before[name]).abs().max()) for name in ("stem.conv.weight", LAST_LEVEL)
    )
    assert 0 < stem < 0.4 * last < 0.01  # layer decay


def test_pretraining_writes_weights_checkpoints_and_metrics(pretrained: Pretrained) -> None:
    run_dir, metrics = pretrained
    assert_pretrained(run_dir, metrics)


def test_a_checkpoint_takes_twelve_bytes_per_parameter_and_four_more_per_copy(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    run_dir, _ = pretrained
    assert _checkpoint_bytes_per_parameter(run_dir) == 12
    averaged = staging.prepared_run(tmp_path, train=16, validation=4, test=4)
    train(averaged, 1, staging.job(pretrain={"max_steps": 1, "ema_decay": 0.9, "keep": "best"}))
    assert _checkpoint_bytes_per_parameter(averaged) == 20


def _checkpoint_bytes_per_parameter(run_dir: RunDir) -> float:
    """Of the tensors alone: the headers of the files matter for tiny networks only."""
    _, newest = list_checkpoints(run_dir.checkpoints("pretrain"))[0]
    values = 0
    for path in newest.glob("*.safetensors"):
        values += sum(tensor.nbytes for tensor in load_file(path).values())
    parameters = sum(tensor.numel() for tensor in staging.weights(run_dir).values())
    return values / parameters


def test_fine_tuning_starts_from_the_pretrained_backbone(pretrained: Pretrained) -> None:
    run_dir, _ = pretrained
    assert_finetuned(run_dir, train(run_dir, 1, staging.job(), "finetune"))


@pytest.mark.slow
def test_pretraining_and_fine_tuning_under_zero_3(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    job = staging.job(pretrain={"zero_stage": 3}, finetune={"zero_stage": 3})
    assert_pretrained(run_dir, train(run_dir, 2, job))
    assert_finetuned(run_dir, train(run_dir, 2, job, "finetune"))


@pytest.mark.slow
def test_compiled_levels_have_the_same_loss(pretrained: Pretrained, tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    job = staging.job(pretrain={"max_steps": 2, "warmup_epochs": 0}, compile=True)
    train(run_dir, 1, job)
    first, _ = staging.events(run_dir, "step")
    expected = staging.losses(pretrained[0])[1]
    assert first.scalars[tags.LOSS] == pytest.approx(expected, rel=1e-4)
    assert staging.scalars(run_dir, tags.MISMATCHED_ELEMENTS) == [0, 0]


def test_a_stage_of_one_step_trains_and_evaluates(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path, train=16, validation=1)
    assert train(run_dir, 1, staging.job(pretrain={"max_steps": 1}))["steps"] == 1
    assert [event.step for event in staging.events(run_dir, "evaluation")] == [1]


def test_fine_tuning_without_weights_logs_a_warning(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path, train=16, validation=1)
    job = staging.job(finetune={"from": "", "max_steps": 1, "image_size": 32})
    train(run_dir, 1, job, "finetune")
    warning = "warning: `from` names no weights: fine-tuning starts from scratch"
    assert warning in staging.messages(run_dir, "finetune")


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    job = staging.job(pretrain={"max_steps": 1})
    train(run_dir, 1, job)
    data = open_dataset(run_dir.dataset(staging.DATASET))
    replace(data.description, fingerprint="another").write(data.path)
    (error,) = staging.run_stage(run_dir, 1, job)
    assert isinstance(error, CheckpointError)
    different = "checkpoint belongs to a different run (data: saved test, now another)"
    assert different in error.message


WITHOUT_RAY = """
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ray":
            raise ImportError("ray is not installed")
sys.meta_path.insert(0, Blocker())
sys.argv = ["pipeline", *sys.argv[1:]]
runpy.run_module("pipeline", run_name="__main__")
"""


def test_the_command_line_trains_one_process_without_ray(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path / "run")
    job = staging.job(pretrain={"max_steps": 1}).model_dump(mode="json", by_alias=True)
    job["stages"] = {"pretrain": job["stages"]["pretrain"]}
    job["data"] = {staging.DATASET: {"root": "x"}}
    job_file = tmp_path / "job.yaml"
    job_file.write_text(json.dumps(job))  # JSON is YAML
    arguments = ["train", job_file, "--stage", "pretrain", "--run-dir", run_dir.path]
    command = [sys.executable, "-c", WITHOUT_RAY, *map(str, arguments)]
    completed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert run_dir.weights("pretrain").is_file()


def train_out_of_memory(job: Job, run_dir: RunDir) -> dict[str, float]:
    """Train on a device that has no memory left in the second backward pass: in the first step."""
    branch = Level.branch
    recomputed = 0

    def failing(level: Level, *inputs: Any) -> torch.Tensor:
        nonlocal recomputed
        recomputed += torch.is_grad_enabled()
        if recomputed > 4 * job.model.columns:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return branch(level, *inputs)

    Level.branch = failing  # type: ignore[method-assign]
    return staging.train(job, "pretrain", run_dir)


def test_out_of_memory_in_a_step_names_the_setting_to_change(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    job = staging.job(pretrain={"micro_batch": 8})
    (error,) = processes.run(tmp_path / "output", 1, train_out_of_memory, job, run_dir)
    assert isinstance(error, StageError), error
    assert error.message.startswith(
        "stages.pretrain.micro_batch: out of memory on the device with 8 images per process: CUDA "
        "out of memory. Tried to allocate 2.00 GiB."
        "\n  -> --set stages.pretrain.micro_batch=4; the same run resumes. Estimate: "
    )
