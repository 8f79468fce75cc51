"""Bad steps in a training stage: skipped, recorded, replayed, rewound, and in the end reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint.manifest import list_checkpoints
from pipeline.config.schema import Job
from pipeline.data.device import DeviceAugment, DeviceBatch
from pipeline.errors import CheckpointError, StageError
from pipeline.layout import RunDir
from pipeline.monitor import tags
from pipeline.train.context import StepContext
from pipeline.train.replay import Verdict, replay
from tests.train import processes, staging

BAD = 6  # the bad step, as users count; 4 steps per epoch: it is batch 1 of epoch 1
Fault = Callable[[], None]


def spoil_images() -> None:
    """One image of step 6 is not finite, whoever computes it."""
    augment = DeviceAugment.__call__

    def spoiled(self: DeviceAugment, *arguments: Any) -> DeviceBatch:
        batch = augment(self, *arguments)
        positions = arguments[3].tolist()
        epoch = arguments[4]
        if epoch == 1 and 17 in positions:
            batch.images[positions.index(17)] = torch.nan
        return batch

    DeviceAugment.__call__ = spoiled  # type: ignore[method-assign]


def spoil_weights() -> None:
    """After step 5 a weight that rank 0 owns is far too large."""
    after_update = StepContext.after_update

    def spoiled(self: StepContext, step: int) -> None:
        after_update(self, step)
        if step == BAD - 2:
            with torch.no_grad():
                fragment = self.state.fragments[0]
                fragment.of(self.state.flats)[0] = 1e30
            self.state.copy_to_model(self.state.flats)

    StepContext.after_update = spoiled  # type: ignore[method-assign]


def spoil_arithmetic() -> None:
    """In step 6 an accumulator of the loss overflows, once."""
    loss = StepContext.loss
    passes = 0

    def spoiled(self: StepContext, *arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        terms = loss(self, *arguments)
        if passes == BAD + 1:  # the first pass is the trial before the first step
            terms = replace(terms, total=terms.total * torch.inf)
        return terms

    StepContext.loss = spoiled  # type: ignore[method-assign]


def train(fault: Fault | None, job: Job, run_dir: RunDir) -> dict[str, float]:
    if fault is not None:
        fault()
    return staging.train(job, "pretrain", run_dir)


def stopped(stop: staging.StopAfter, job: Job, run_dir: RunDir) -> dict[str, float]:
    return staging.train(job, "pretrain", run_dir, stop)


def replay_after(fault: Fault | None, job: Job, step: int, run_dir: RunDir) -> Verdict:
    if fault is not None:
        fault()
    return replay(job, "pretrain", run_dir, step, print)


def run(run_dir: RunDir, function: processes.Function, *arguments: Any) -> list[Any]:
    """Call a function with the run directory as its last argument, on two ranks."""
    return processes.run(run_dir.logs / "output", 2, function, *arguments, run_dir)


def replay_of(run_dir: RunDir, fault: Fault | None, job: Job, step: int = BAD) -> Any:
    """The verdict on a step of a run of two ranks, by one process; or the error."""
    arguments = (fault, job, step, run_dir)
    (verdict,) = processes.run(run_dir.logs / "replay", 1, replay_after, *arguments)
    return verdict


def job(**pretrain: Any) -> Job:
    return staging.job(pretrain={"checkpoint_every_steps": 3} | pretrain)


@pytest.mark.parametrize(
    ("fault", "again", "cause", "text"),
    [
        (spoil_images, spoil_images, "data", "first not finite: the images"),
        (spoil_weights, None, "weights", "largest value 1e+30"),
        (spoil_arithmetic, None, "arithmetic", "here the step is in order"),
    ],
)
def test_a_bad_step_is_skipped_and_its_replay_names_the_cause(
    fault: Fault, again: Fault | None, cause: str, text: str, tmp_path: Path
) -> None:
    run_dir = staging.prepared_run(tmp_path)
    trained = job(guard={"max_skipped": 99}, max_steps=8)
    results = run(run_dir, train, fault, trained)
    # The process that plays both ranks has no part in what the arithmetic of the run did.
    if cause != "weights":
        assert isinstance(results[0], dict), results
        assert staging.scalars(run_dir, tags.SKIPPED_STEPS) == [0] * 5 + [1] * 3
    verdict = replay_of(run_dir, again, trained)
    assert isinstance(verdict, Verdict), verdict
    assert verdict.cause == cause, verdict.lines
    assert text in "\n".join(verdict.lines)
    assert (run_dir.captures("pretrain") / "replay-00000006.png").stat().st_size > 1000
    record = json.loads((run_dir.captures("pretrain") / "step-00000005.json").read_text())
    assert record["step"] == BAD
    assert [len(part["samples"]) for part in record["micro_batches"]] == [8, 8]


def test_a_step_that_is_in_order_is_replayed_from_the_checkpoint_before(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    settings = job(max_steps=8)
    run(run_dir, train, None, settings)
    assert replay_of(run_dir, None, settings, 8).cause == "none"
    error = replay_of(run_dir, None, settings, 2)  # before the first checkpoint
    assert isinstance(error, CheckpointError)
    assert "no capture or checkpoint with at most 1 steps is left" in error.message


def test_after_too_many_bad_steps_their_images_are_left_out(tmp_path: Path) -> None:
    """Interrupted or not, the run that returns to a checkpoint ends with the same weights."""
    weights = []
    for name, stop in (("whole", None), ("stopped", staging.StopAfter(4, 0))):
        run_dir = staging.prepared_run(tmp_path / name)
        settings = job(guard={"max_skipped": 0})
        if stop is not None:
            run(run_dir, stopped, stop, settings)
            # A checkpoint at which the undisturbed run has none: no place to return to.
            assert list_checkpoints(run_dir.checkpoints("pretrain"))[0][0] == 5
        results = run(run_dir, train, spoil_images, settings)
        assert isinstance(results[0], dict), results
        assert "the images of steps" in staging.messages(run_dir)
        assert "are left out" in staging.messages(run_dir)
        weights.append(staging.weights(run_dir))
        assert len(staging.losses(run_dir)) == 12
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name


def test_a_hopeless_learning_rate_ends_with_a_report(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    settings = job(base_lr=2.0, warmup_epochs=0, guard={"max_skipped": 2}, epochs=30, clip_grad=0)
    error, _ = run(run_dir, train, None, settings)
    assert isinstance(error, StageError), error
    assert "training does not recover: 3 bad steps in the last 100" in error.message
    assert "lower base_lr" in error.remedy
    assert len(staging.losses(run_dir)) < 60
    assert not run_dir.weights("pretrain").exists()


def test_weights_that_are_not_finite_are_refused_at_the_start(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    weights = staging.with_weights(tmp_path)
    weights["stem.conv.weight"][0] = torch.nan
    path = tmp_path / "bad.safetensors"
    staging.save_file(weights, path)
    settings = staging.job(finetune={"from": str(path)})
    results = staging.run_stage(run_dir, 2, settings, "finetune")
    for error in results:
        assert isinstance(error, CheckpointError), results
        assert "weight stem.conv.weight is not finite" in error.message
