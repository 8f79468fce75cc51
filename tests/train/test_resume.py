"""Resuming a training stage after a kill, a stop request, a full disk, and from old checkpoints."""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.manifest import list_checkpoints
from pipeline.config.schema import Job
from pipeline.errors import CheckpointError, Interrupted
from pipeline.files import write_json
from pipeline.layout import RunDir
from tests.train import processes, staging

KILLS = 3


def train(
    run_dir: RunDir,
    job: Job,
    stage: str = "pretrain",
    *,
    world_size: int = 2,
    stop: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """Run a stage to its end; the metrics of rank 0."""
    results = staging.run_stage(run_dir, world_size, job, stage, stop)
    assert all(isinstance(metrics, dict) for metrics in results), results
    first: dict[str, float] = results[0]
    return first


def checkpoint_steps(run_dir: RunDir) -> list[int]:
    return [step for step, _ in list_checkpoints(run_dir.checkpoints("pretrain"))]


def assert_same_run(a: RunDir, b: RunDir) -> None:
    """The same loss curve and bit-equal weights."""
    assert staging.losses(b) == pytest.approx(staging.losses(a), rel=1e-12)
    staging.assert_same_weights(a, b)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run_dir = staging.prepared_run(tmp_path_factory.mktemp("uninterrupted"))
    train(run_dir, staging.job())
    return run_dir


def test_a_run_killed_at_random_moments_gives_the_same_weights(
    uninterrupted: RunDir, tmp_path: Path
) -> None:
    run_dir = staging.prepared_run(tmp_path)
    job = staging.job()
    seed = time.time_ns()
    print(f"random seed {seed}")
    moments = random.Random(seed)
    checkpoints = run_dir.checkpoints("pretrain")
    for kill in range(KILLS):
        arguments = (job, "pretrain", run_dir)
        group = processes.start(run_dir.logs / "output", 2, staging.train, *arguments)
        # The first kill falls between two checkpoints, the others anywhere.
        deadline = time.monotonic() + 60
        while kill == 0 and not list_checkpoints(checkpoints) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3 if kill == 0 else 2.5))
        group.kill()
    train(run_dir, job)
    assert_same_run(uninterrupted, run_dir)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_request_on_one_rank_stops_all_after_the_same_step(
    rank: int, uninterrupted: RunDir, tmp_path: Path
) -> None:
    run_dir = staging.prepared_run(tmp_path)
    stopped = staging.run_stage(run_dir, 2, staging.job(), stop=staging.StopAfter(6, rank))
    for error in stopped:
        assert isinstance(error, Interrupted), stopped
        assert "after step 7 of 12" in error.message
    assert checkpoint_steps(run_dir)[0] == 7
    metrics = train(run_dir, staging.job())
    assert metrics["steps"] == 12
    assert "resuming from step 7" in staging.messages(run_dir)
    assert_same_run(uninterrupted, run_dir)


class FullDisk:
    """No file may grow beyond a limit during the steps [first, last), as on a full disk."""

    def __init__(self, first: int, last: int) -> None:
        self.first = first
        self.last = last
        self.step = 0

    def __call__(self) -> bool:
        limit = 100_000 if self.first <= self.step < self.last else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        self.step += 1
        return False


def test_a_full_disk_skips_a_checkpoint_with_a_warning(
    uninterrupted: RunDir, tmp_path: Path
) -> None:
    run_dir = staging.prepared_run(tmp_path)
    job = staging.job(pretrain={"checkpoint_every_steps": 2})
    train(run_dir, job, stop=FullDisk(4, 9))
    warning = "warning: checkpoint at step 8 could not be written, training continues: rank"
    assert warning in staging.messages(run_dir)
    assert checkpoint_steps(run_dir) == [12, 10]
    assert not list(run_dir.checkpoints("pretrain").glob(".*"))
    assert_same_run(uninterrupted, run_dir)


def test_a_full_disk_at_the_end_fails_with_a_remedy(uninterrupted: RunDir, tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    job = staging.job(pretrain={"keep_checkpoints": 1})
    failed = staging.run_stage(run_dir, 2, job, stop=FullDisk(9, 99))
    for error in failed:
        assert isinstance(error, CheckpointError), failed
        assert "final checkpoint" in error.message
        assert "free some disk space" in error.message
    assert not run_dir.weights("pretrain").exists()
    train(run_dir, job)
    assert_same_run(uninterrupted, run_dir)
    assert checkpoint_steps(run_dir) == [12]


def test_a_finished_stage_returns_its_metrics_again_without_training(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    job = staging.job(pretrain={"max_steps": 5, "keep_checkpoints": 1})
    metrics = train(run_dir, job, world_size=1)
    assert metrics["steps"] == 5
    weights = staging.weights(run_dir)
    # As if killed between the last checkpoint and the result.
    run_dir.weights("pretrain").unlink()
    assert train(run_dir, job, world_size=1) == metrics
    assert len(staging.events(run_dir, "step")) == 5
    for name, value in staging.weights(run_dir).items():
        assert torch.equal(value, weights[name]), name
    (error,) = staging.run_stage(run_dir, 1, staging.job())
    assert isinstance(error, CheckpointError)
    assert "(total_steps: saved 5, now 12)" in error.message


def downgrade(directory: Path) -> None:
    """Rewrite a checkpoint's manifest as the version before wrote it.

    Its network had no huge wiring, but a key that is gone; it did not record the order.
    """
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    state = manifest["state"]
    del state["identity"]["network"]["huge"]
    del state["identity"]["order"]
    state["identity"]["network"]["gone"] = 1
    manifest["state"] = {
        "identity": state["identity"],
        "optimizer_steps": state["applied_steps"],
        "repeated_steps": state["retried_steps"],
        "replaced_samples": state["replaced_samples"],
        "metrics": state["metric_sums"],
        "history": state["evaluations"],
        "figures": state["last_metrics"],
    }
    del manifest["digest"]
    write_json(path, manifest)


def test_a_checkpoint_of_the_version_before_resumes(uninterrupted: RunDir, tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    job = staging.job(pretrain={"log_every_steps": 5})
    stopped = staging.run_stage(run_dir, 2, job, stop=staging.StopAfter(6, 0))
    assert isinstance(stopped[0], Interrupted), stopped
    for _, directory in list_checkpoints(run_dir.checkpoints("pretrain")):
        downgrade(directory)
    train(run_dir, job)
    assert "resuming from step 7" in staging.messages(run_dir)
    staging.assert_same_weights(uninterrupted, run_dir)
    # The log at step 10 covers steps 6 to 10, of which 6 and 7 come from the checkpoint.
    losses = staging.losses(uninterrupted)
    expected = sum(losses[step] for step in range(6, 11)) / 5
    assert staging.losses(run_dir)[10] == pytest.approx(expected, rel=1e-12)
    evaluations = [event.step for event in staging.events(run_dir, "evaluation")]
    assert evaluations == [6, 12]


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "precision"), [(1, "bf16"), (3, "fp32")])
def test_running_statistics_resume_and_transfer_to_fine_tuning(
    zero_stage: int, precision: str, tmp_path: Path
) -> None:
    settings = {
        "zero_stage": zero_stage,
        "precision": precision,
        "max_steps": 6,
        "checkpoint_every_steps": 3,
    }
    job = staging.job(settings, settings | {"ema_decay": 0.9}, block="c2f", drop_path=0)
    complete = staging.prepared_run(tmp_path / "a")
    stopped = staging.prepared_run(tmp_path / "b")
    train(complete, job)
    staging.run_stage(stopped, 2, job, stop=staging.StopAfter(2, 1))
    train(stopped, job)
    assert_same_run(complete, stopped)
    weights = staging.weights(complete)
    means = [value for name, value in weights.items() if name.endswith("running_mean")]
    assert means
    for mean in means:
        assert mean.dtype == torch.float32
        assert mean.any()
    train(complete, job, "finetune")
    name = "stem.conv.norm.running_var"
    change = staging.weights(complete, "finetune")[name] - weights[name]
    assert 0 < float(change.abs().max()) < 1
    (metrics,) = processes.run(tmp_path / "evaluate", 1, staging.evaluate, job, complete)
    assert {"top1", "loss"} <= set(metrics)
