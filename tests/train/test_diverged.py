"""A training that no longer changes its weights ends, and hands nothing on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import CheckpointError, StageError
from tests.train import staging

MOST_SKIPPED = 6  # at a time; an epoch has 4 steps


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("base_lr", [1e4, 1e30])
def test_a_diverged_stage_ends_with_step_cause_and_remedy(
    world_size: int, base_lr: float, tmp_path: Path
) -> None:
    run_dir = staging.prepared_run(tmp_path)
    job = staging.job(pretrain={"base_lr": base_lr, "epochs": 40, "warmup_epochs": 0})
    for error in staging.run_stage(run_dir, world_size, job):
        assert isinstance(error, StageError), error
        assert error.exit_code == 3
        assert "training does not recover" in error.cause
        assert error.place == "stages.pretrain"
        assert "lower base_lr" in error.remedy
    skipped = staging.scalars(run_dir, "optim/skipped_steps")
    assert max(skipped, default=0) <= MOST_SKIPPED
    assert not run_dir.weights("pretrain").exists()


def test_a_few_skipped_steps_are_counted_in_the_result(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    # Too few steps to be sure that training has diverged.
    job = staging.job(pretrain={"base_lr": 1e30, "epochs": 1, "warmup_epochs": 0})
    (metrics,) = staging.run_stage(run_dir, 1, job)
    assert isinstance(metrics, dict), metrics
    assert 0 < metrics["skipped_steps"] < metrics["steps"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_trained_further(value: float, tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    staging.with_weights(run_dir.path)
    file = run_dir.weights("finetune")
    state = load_file(file)
    state["stem.conv.weight" if "stem.conv.weight" in state else sorted(state)[-1]].view(-1)[0] = (
        value
    )
    other = tmp_path / "other.safetensors"
    save_file(state, other)
    (tmp_path / "weights.json").write_text((file.parent / "weights.json").read_text())
    job = staging.job(finetune={"from": str(other), "max_steps": 1, "image_size": 32})
    (error,) = staging.run_stage(run_dir, 1, job, "finetune")
    assert isinstance(error, CheckpointError), error
    assert "not finite" in error.cause
    assert not torch.cuda.is_available() or error.place
