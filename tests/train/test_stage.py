"""A whole training stage on a small prepared dataset: results, and going on after every kind of disturbance."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.checkpoint.manifest import list_checkpoints
from pipeline.config.schema import Job
from pipeline.data.dataset import open_dataset
from pipeline.errors import CheckpointError, Interrupted, StageError
from pipeline.layout import RunDir
from pipeline.runtime.dist_env import DistEnv
from pipeline.train.trainer import train_stage
from tests.train import processes, staging

STEPS = 12
LAST = "columns.3.levels.3.down.conv.weight"
FIGURES = {"loss", "top1", "top5", "images_per_s", "data_wait_share", "steps"}


def train(
    run_dir: Path, world: int, job: Job, stage: str = "pretrain", **options: Any
) -> dict[str, float]:
    figures, *others = processes.run(
        run_dir / "logs" / stage, world, staging.train, job, stage, run_dir, *options.values()
    )
    assert isinstance(figures, dict), figures
    agreed = ("loss", "top1", "top5", "steps")  # rates are each rank's own
    assert all(
        [other[key] for key in agreed] == [figures[key] for key in agreed] for other in others
    )
    return figures


def assert_same(a: Path, b: Path) -> None:
    """The same loss curve and bit-equal weights."""
    assert staging.losses(b) == pytest.approx(staging.losses(a), rel=1e-12)
    found, expected = staging.weights(b), staging.weights(a)
    assert all(torch.equal(found[name], value) for name, value in expected.items()) and len(
        found
    ) == len(expected)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = staging.prepared(tmp_path_factory.mktemp("undisturbed"))
    train(run_dir, 2, staging.job())
    return run_dir


@pytest.mark.parametrize(("world", "zero"), [(1, 1), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_pretraining_then_fine_tuning(world: int, zero: int, tmp_path: Path) -> None:
    run_dir, job = (
        staging.prepared(tmp_path),
        staging.job(pretrain={"zero_stage": zero}, finetune={"zero_stage": zero}),
    )
    figures = train(run_dir, world, job)
    assert set(figures) == FIGURES and figures["steps"] == STEPS
    description = json.loads((run_dir / "stages/pretrain/weights.json").read_text())
    assert (
        description["weights"] == "master"
        and description["step"] == STEPS
        and description["figures"] == figures
    )
    assert [event.step for event in staging.events(run_dir, "evaluation")] == [6, 12]
    assert [step for step, _ in list_checkpoints(run_dir / "checkpoints/pretrain")] == [
        12,
        8,
    ]  # keep_checkpoints
    assert_board(run_dir / "tensorboard" / "pretrain")
    figures = train(run_dir, world, job, "finetune")
    assert set(figures) == FIGURES and figures["steps"] == 4
    description = json.loads((run_dir / "stages/finetune/weights.json").read_text())
    assert description["weights"] == "ema" and description["image_size"] == 64
    assert description["classes"] == [f"c{i}" for i in range(staging.CLASSES)]
    before, after = staging.weights(run_dir), staging.weights(run_dir, "finetune")
    assert set(after) == {
        name for name in before if not name.startswith(("classifiers", "decoders"))
    } | {
        f"classifiers.0.{name}"
        for name in ("norm.weight", "norm.bias", "linear.weight", "linear.bias")
    }
    assert (
        f"loaded {len(after) - 4} parameters from pretrain; 4 of the heads are new"
        in staging.messages(run_dir, "finetune")
    )
    stem, last = (
        float((after[name] - before[name]).abs().max()) for name in ("stem.conv.weight", LAST)
    )
    assert 0 < stem < 0.4 * last < 0.01  # layer decay


def assert_board(folder: Path) -> None:
    board = EventAccumulator(str(folder)).Reload()
    tags = board.Tags()
    expected = {
        "loss/total",
        "accuracy/train_top1",
        "accuracy/top1",
        "accuracy/top5",
        "optim/lr",
        "optim/grad_norm",
        "throughput/images_per_s",
        "throughput/data_wait_share",
        "memory/rss_mib",
        "reversible/mismatched_elements",
        *(f"loss/position_{i}/classification" for i in range(4)),
        *(f"loss/position_{i}/reconstruction" for i in range(3)),
    }
    assert expected <= set(tags["scalars"])
    assert [event.step for event in board.Scalars("loss/total")] == list(range(1, STEPS + 1))
    assert all(event.value == 0 for event in board.Scalars("reversible/mismatched_elements"))
    picture = board.Images("reconstructions")[-1]
    assert (picture.width, picture.height) == (
        8 * 32,
        4 * 32,
    )  # eight inputs over their three reconstructions
    assert {"custom_scalars__config__"} <= set(
        tags["tensors"]
    ) and "_hparams_/session_start_info" in board.summary_metadata


def test_killed_at_random_moments(undisturbed: Path, tmp_path: Path) -> None:
    run_dir, job, moments = staging.prepared(tmp_path), staging.job(), random.Random(time.time_ns())
    checkpoints = run_dir / "checkpoints" / "pretrain"
    for kill in range(3):
        group = processes.start(run_dir / "logs", 2, staging.train, job, "pretrain", run_dir)
        deadline = time.monotonic() + 60
        while kill == 0 and not list_checkpoints(checkpoints) and time.monotonic() < deadline:
            time.sleep(0.01)  # the first time between checkpoints, then anywhere
        time.sleep(moments.uniform(0, 0.3 if kill == 0 else 2.5))
        group.kill()
    train(run_dir, 2, job)
    assert_same(undisturbed, run_dir)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wish_to_stop_on_one_rank_stops_all_after_the_same_step(
    rank: int, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir, job = staging.prepared(tmp_path), staging.job()
    stopped = processes.run(
        run_dir / "logs", 2, staging.train, job, "pretrain", run_dir, staging.StopAfter(6, rank)
    )
    assert all(
        isinstance(error, Interrupted) and "after step 7 of 12" in error.message
        for error in stopped
    ), stopped
    assert list_checkpoints(run_dir / "checkpoints/pretrain")[0][0] == 7
    assert set(train(run_dir, 2, job)) == FIGURES
    assert "going on from step 7" in staging.messages(run_dir)
    assert_same(undisturbed, run_dir)


class FullDisk:
    """No file may grow beyond some size during the steps [first, last), as on a full disk."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.step = first, last, 0

    def __call__(self) -> bool:
        limit = 100_000 if self.first <= self.step < self.last else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        self.step += 1
        return False


def test_a_full_disk_costs_a_warning_and_the_next_checkpoint_is_written(
    undisturbed: Path, tmp_path: Path
) -> None:
    run_dir, job = staging.prepared(tmp_path), staging.job(pretrain={"checkpoint_every_steps": 2})
    train(run_dir, 2, job, stop=FullDisk(4, 9))
    assert (
        "warning: the checkpoint at step 8 cannot be written, training goes on: rank"
        in staging.messages(run_dir)
    )
    assert [step for step, _ in list_checkpoints(run_dir / "checkpoints/pretrain")] == [12, 10]
    assert not list((run_dir / "checkpoints/pretrain").glob(".*"))
    assert_same(undisturbed, run_dir)


def test_a_full_disk_at_the_end_names_the_remedy(undisturbed: Path, tmp_path: Path) -> None:
    run_dir, job = staging.prepared(tmp_path), staging.job(pretrain={"keep_checkpoints": 1})
    failed = processes.run(
        run_dir / "logs", 2, staging.train, job, "pretrain", run_dir, FullDisk(9, 99)
    )
    assert all(
        isinstance(error, CheckpointError) and "final checkpoint" in error.message
        for error in failed
    ), failed
    assert (
        "make room" in failed[0].message
        and not (run_dir / "stages/pretrain/weights.safetensors").exists()
    )
    train(run_dir, 2, job)
    assert_same(undisturbed, run_dir)
    assert [step for step, _ in list_checkpoints(run_dir / "checkpoints/pretrain")] == [12]


def test_a_finished_stage_gives_its_figures_again_without_a_step(tmp_path: Path) -> None:
    run_dir, job = (
        staging.prepared(tmp_path),
        staging.job(pretrain={"max_steps": 5, "keep_checkpoints": 1}),
    )
    figures = train(run_dir, 1, job)
    assert figures["steps"] == 5
    kept = staging.weights(run_dir)
    (
        run_dir / "stages/pretrain/weights.safetensors"
    ).unlink()  # killed between the last checkpoint and the result
    assert train(run_dir, 1, job) == figures
    assert len(staging.events(run_dir, "step")) == 5
    assert all(torch.equal(value, kept[name]) for name, value in staging.weights(run_dir).items())
    with pytest.raises(AssertionError, match="total_steps: 5 there, 12 now"):
        train(run_dir, 1, staging.job())


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "precision"), [(1, "bf16"), (3, "fp32")])
def test_running_statistics_are_part_of_a_run(
    zero_stage: int, precision: str, tmp_path: Path
) -> None:
    settings = {
        "zero_stage": zero_stage,
        "precision": precision,
        "max_steps": 6,
        "checkpoint_every_steps": 3,
    }
    job = staging.job(settings, settings | {"ema_decay": 0.9}, block="c2f", drop_path=0)
    undisturbed, stopped = staging.prepared(tmp_path / "a"), staging.prepared(tmp_path / "b")
    train(undisturbed, 2, job)
    processes.run(
        stopped / "logs", 2, staging.train, job, "pretrain", stopped, staging.StopAfter(2, 1)
    )
    train(stopped, 2, job)
    assert_same(undisturbed, stopped)
    found = staging.weights(undisturbed)
    means = [value for name, value in found.items() if name.endswith("running_mean")]
    assert means and all(value.dtype == torch.float32 and value.any() for value in means)
    train(undisturbed, 2, job, "finetune")
    before, after = (
        found["stem.conv.norm.running_var"],
        staging.weights(undisturbed, "finetune")["stem.conv.norm.running_var"],
    )
    assert 0 < float((before - after).abs().max()) < 1
    assert set(processes.run(tmp_path / "e", 1, staging.evaluate, job, undisturbed)[0]) >= {
        "top1",
        "top5",
    }


@pytest.mark.slow
def test_compiled_levels_train_like_the_others(undisturbed: Path, tmp_path: Path) -> None:
    run_dir, job = (
        staging.prepared(tmp_path),
        staging.job(pretrain={"max_steps": 2, "warmup_epochs": 0}, compile=True),
    )
    train(run_dir, 1, job)
    first, _ = staging.events(run_dir, "step")
    assert first.scalars["loss/total"] == pytest.approx(staging.losses(undisturbed)[1], rel=1e-4)
    assert all(
        event.scalars["reversible/mismatched_elements"] == 0
        for event in staging.events(run_dir, "step")
    )


def test_a_stage_of_one_step(tmp_path: Path) -> None:
    run_dir = staging.prepared(tmp_path, train=16, validation=1)
    assert train(run_dir, 1, staging.job(pretrain={"max_steps": 1}))["steps"] == 1
    assert [event.step for event in staging.events(run_dir, "evaluation")] == [1]


def test_fine_tuning_without_weights_says_so(tmp_path: Path) -> None:
    run_dir = staging.prepared(tmp_path, train=16, validation=1)
    train(
        run_dir, 1, staging.job(finetune={"from": "", "max_steps": 1, "image_size": 32}), "finetune"
    )
    assert "no weights are named by `from`: fine-tuning starts from scratch" in staging.messages(
        run_dir, "finetune"
    )


def outdated(job: Job, run_dir: Path) -> dict[str, float]:
    return train_stage(job, "pretrain", RunDir(run_dir), DistEnv(generation=1), lambda: False)


def test_a_replaced_group_of_processes_commits_nothing(tmp_path: Path) -> None:
    run_dir = staging.prepared(tmp_path)
    (run_dir / "stages/pretrain").mkdir()
    (run_dir / "stages/pretrain/generation").write_text("2")
    (error,) = processes.run(tmp_path / "logs", 1, outdated, staging.job(), run_dir)
    assert isinstance(error, StageError) and "newer group" in error.message
    assert not list((run_dir / "checkpoints").rglob("manifest.json"))


def test_other_data_is_refused(tmp_path: Path) -> None:
    run_dir, job = staging.prepared(tmp_path), staging.job(pretrain={"max_steps": 1})
    train(run_dir, 1, job)
    path = open_dataset(run_dir / "stages/prepare/set").path / "dataset.json"
    path.write_text(path.read_text().replace('"test"', '"another"'))
    (error,) = processes.run(tmp_path / "logs", 1, staging.train, job, "pretrain", run_dir)
    assert isinstance(error, CheckpointError) and "data: test there, another now" in error.message


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


def test_one_process_trains_by_the_command_line_without_ray(tmp_path: Path) -> None:
    run_dir = staging.prepared(tmp_path / "run")
    job = staging.job(pretrain={"max_steps": 1}).model_dump(mode="json", by_alias=True)
    job["stages"] = {"pretrain": job["stages"]["pretrain"]}
    job["data"] = {"set": {"root": "x"}}
    (tmp_path / "job.yaml").write_text(json.dumps(job))  # JSON is YAML
    arguments = [
        "train",
        str(tmp_path / "job.yaml"),
        "--stage",
        "pretrain",
        "--run-dir",
        str(run_dir),
    ]
    command = [sys.executable, "-c", WITHOUT_RAY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run_dir / "stages/pretrain/weights.safetensors").is_file()
