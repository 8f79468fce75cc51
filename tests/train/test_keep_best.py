"""``keep: best``: the weights of the best evaluation on the selection split are the result."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.manifest import Manifest, list_checkpoints
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config.schema import Job
from pipeline.errors import ConfigError
from pipeline.evaluate.accuracy import Evaluation
from pipeline.evaluate.metrics import TOP1
from pipeline.layout import RunDir
from pipeline.monitor import tags
from pipeline.train.selection import Selection
from pipeline.train.stage_evaluation import StageEvaluation
from tests.train import processes, staging

SELECTION = 23
KEEP_BEST: dict[str, Any] = {
    "keep": "best",
    "ema_decay": 0.5,
    "eval_every_epochs": 0.5,  # 6 evaluations of 2 steps
    "checkpoint_every_steps": 3,
}
STEPS = 12
# What the evaluations find on the selection split. The network is too small for a figure that is
# the same on every processor, and the best step must not be the last one.
SCORES = (0.3, 0.5, 0.6, 0.7, 0.4, 0.2)
BEST = 8


def best_job(changes: dict[str, Any] | None = None, **model: Any) -> Job:
    return staging.job(pretrain=KEEP_BEST | (changes or {}), **model)


def best_run(path: Path) -> RunDir:
    return staging.prepared_run(path, selection=SELECTION)


def train_with_scores(
    job: Job, stage: str, run_dir: RunDir, stop: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """``staging.train`` whose evaluations on the selection split find ``SCORES``."""
    original = StageEvaluation._validate

    def validate(stage: StageEvaluation, split: str, done: int) -> Evaluation:
        evaluation = original(stage, split, done)
        if split != "selection":
            return evaluation
        score = SCORES[len(stage.setup.history.evaluations)]
        return replace(evaluation, metrics=evaluation.metrics | {TOP1: score})

    StageEvaluation._validate = validate  # type: ignore[method-assign]
    return staging.train(job, stage, run_dir, stop)


def run_group(run_dir: RunDir, world_size: int, job: Job, *stop: Callable[[], bool]) -> list[Any]:
    arguments = (job, "pretrain", run_dir, *stop)
    return processes.run(run_dir.logs / "output", world_size, train_with_scores, *arguments)


def train(run_dir: RunDir, job: Job, world_size: int = 2) -> dict[str, float]:
    results = run_group(run_dir, world_size, job)
    assert all(isinstance(metrics, dict) for metrics in results), results
    first: dict[str, float] = results[0]
    return first


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[str, float]]:
    run_dir = best_run(tmp_path_factory.mktemp("uninterrupted"))
    return run_dir, train(run_dir, best_job())


def test_the_latest_of_equal_evaluations_is_the_best() -> None:
    evaluations = [
        {"step": 5.0, "top1": 0.9},  # before the stage selected
        {"step": 10.0, "top1": 0.8, "selection_top1": 0.61},
        {"step": 20.0, "top1": 0.2, "selection_top1": 0.64},
        {"step": 30.0, "top1": 0.1, "selection_top1": 0.64},
        {"step": 40.0, "top1": 0.7, "selection_top1": 0.63},
    ]
    assert Selection("selection").best(evaluations)["step"] == 30
    assert Selection("selection").best(evaluations[:2])["step"] == 10


def test_the_choice_is_stated_in_metrics_description_log_and_tensorboard(
    uninterrupted: tuple[RunDir, dict[str, float]],
) -> None:
    run_dir, metrics = uninterrupted
    evaluations = {event.step: event.scalars for event in staging.events(run_dir, "evaluation")}
    assert sorted(evaluations) == [2, 4, 6, 8, 10, 12]
    scores = {step: scalars[tags.SELECTION_TOP1] for step, scalars in evaluations.items()}
    best = BEST
    assert tuple(scores[step] for step in sorted(scores)) == SCORES
    assert metrics["kept_step"] == best
    assert metrics["selection_top1"] == scores[best]
    # Of the same weights, on the reported split.
    assert metrics["top1"] == evaluations[best][tags.TOP1]
    description = WeightsDescription.read(run_dir.weights("pretrain"))
    assert (description.step, description.keep) == (best, "best")
    assert (description.selection_split, description.weights) == ("selection", "ema")
    stated = f"kept the weights of step {best}: top-1 {scores[best]:.1%} on the selection split"
    assert stated in staging.messages(run_dir)
    board = EventAccumulator(str(run_dir.tensorboard("pretrain"))).Reload()
    assert board.Scalars(tags.KEPT_STEP)[-1].value == best
    assert [event.value for event in board.Scalars(tags.SELECTION_TOP1)] == pytest.approx(
        list(scores.values())
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "block"),
    [
        ({"zero_stage": 0, "ema_decay": 0, "warmup_epochs": 0}, "c2f"),  # running statistics
        ({"zero_stage": 1}, "convnext"),
        ({"zero_stage": 3, "precision": "bf16"}, "convnext"),
    ],
    ids=["zero 0", "zero 1", "zero 3"],
)
def test_the_result_has_the_weights_of_the_chosen_step(
    settings: dict[str, Any], block: str, tmp_path: Path
) -> None:
    run_dir = best_run(tmp_path)
    every_step = {"checkpoint_every_steps": 1, "keep_checkpoints": STEPS}
    metrics = train(run_dir, best_job(settings | every_step, block=block, drop_path=0))
    assert metrics["kept_step"] == BEST
    # The checkpoint of the chosen step has the weights that were evaluated.
    directory = dict(list_checkpoints(run_dir.checkpoints("pretrain")))[int(metrics["kept_step"])]
    manifest = Manifest.read(directory)
    reader = CheckpointReader(directory, manifest)
    kind = "ema" if "ema" in manifest.kinds else "master"
    kept = staging.weights(run_dir)
    assert set(kept) == set(manifest.shapes)
    for name, value in kept.items():
        assert torch.equal(value, reader.full(kind, name)), name


class KillAfter:
    """Kills its process (rank 0) after ``steps`` steps: after an evaluation, before its save."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self) -> bool:
        self.steps -= 1
        if self.steps == 0 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def test_a_run_killed_between_evaluation_and_save_keeps_the_same_weights(
    uninterrupted: tuple[RunDir, dict[str, float]], tmp_path: Path
) -> None:
    reference, metrics = uninterrupted
    run_dir = best_run(tmp_path)
    # At the best evaluation, and at the next one. A checkpoint lies at neither.
    for steps in (BEST, BEST + 2):
        done = next((step for step, _ in list_checkpoints(run_dir.checkpoints("pretrain"))), 0)
        arguments = (best_job(), "pretrain", run_dir, KillAfter(steps - done))
        group = processes.start(run_dir.logs / "output", 2, train_with_scores, *arguments)
        deadline = time.monotonic() + 120
        while group.processes[0].is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert group.processes[0].exitcode == -signal.SIGKILL
        group.kill()
        assert staging.events(run_dir, "evaluation")[-1].step == steps
    resumed = train(run_dir, best_job())
    timed = {"images_per_s", "data_wait_share"}
    assert {key: value for key, value in resumed.items() if key not in timed} == {
        key: value for key, value in metrics.items() if key not in timed
    }
    staging.assert_same_weights(reference, run_dir)


@pytest.mark.slow
def test_the_best_weights_move_to_another_zero_stage_and_number_of_processes(
    uninterrupted: tuple[RunDir, dict[str, float]], tmp_path: Path
) -> None:
    reference, _ = uninterrupted
    run_dir = best_run(tmp_path)
    run_group(run_dir, 2, best_job(), staging.StopAfter(BEST, 0))
    resumed = train(run_dir, best_job({"zero_stage": 3}), world_size=1)
    assert resumed["kept_step"] == BEST
    staging.assert_same_weights(reference, run_dir)


def test_one_copy_of_the_weights_is_added_to_a_checkpoint(
    uninterrupted: tuple[RunDir, dict[str, float]],
) -> None:
    run_dir, _ = uninterrupted
    newest = list_checkpoints(run_dir.checkpoints("pretrain"))[0][1]
    assert Manifest.read(newest).kinds == ["master", "exp_avg", "exp_avg_sq", "ema", "best"]
    names = {path.name for path in run_dir.stage("pretrain").iterdir()}
    assert names == {"weights.safetensors", "weights.json"}


def test_with_a_test_split_the_validation_images_choose(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path, test=5)
    metrics = train(run_dir, best_job({"max_steps": 4}), world_size=1)
    assert metrics["validation_top1"] == metrics["top1"]
    assert "on the validation split" in staging.messages(run_dir)


def test_a_dataset_that_cannot_choose_is_refused_by_the_stage(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    (error,) = run_group(run_dir, 1, best_job())
    assert isinstance(error, ConfigError)
    assert error.message.startswith("stages.pretrain.keep: keep: best needs images that choose")
    assert "--set data.set.selection_fraction=0.1, or keep: last" in error.message
    assert not run_dir.checkpoints("pretrain").exists()


def test_a_set_too_small_for_a_selection_split_keeps_the_last_weights(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path, train=16)
    job = best_job({"max_steps": 1})
    values = job.model_dump(mode="json", by_alias=True)
    values["data"][staging.DATASET]["selection_fraction"] = 0.1
    metrics = train(run_dir, Job.model_validate(values), world_size=1)
    assert "kept_step" not in metrics
    warning = "warning: set has too few images to choose the best weights: the last are kept"
    assert warning in staging.messages(run_dir)
    assert WeightsDescription.read(run_dir.weights("pretrain")).keep == "last"
