"""Wrong arithmetic in a training stage: the step is retried, logged, or ends the stage."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.schema import Job
from pipeline.errors import StageError
from pipeline.layout import RunDir
from pipeline.model import Activations, Network, NetworkSpec, reversible
from pipeline.model.column import Level
from pipeline.monitor import tags
from pipeline.train import trainer
from pipeline.train.self_check import SelfCheck
from tests.train import processes, staging

STEPS = 4
ORIGIN = (
    r"column 2, level 1: \d+ elements differ from the forward pass( \(and \d+ more findings\))?, "
    r"on rank 1, host \S"
)


def job(**pretrain: Any) -> Job:
    """Two micro-batches per step on each of two ranks."""
    return staging.job(
        pretrain={"micro_batch": 4, "max_steps": STEPS, "checkpoint_every_steps": 2} | pretrain
    )


@pytest.mark.parametrize("activations", ["stored", "checkpointed"])
def test_without_a_self_check_nothing_is_counted_on_the_host(activations: Activations) -> None:
    # Metrics are summed where the network computes: a count on the host could not be added.
    device = torch.device("meta")
    spec = NetworkSpec((8, 8, 8, 8), (1, 1, 1, 1), 2, 3, activations=activations)
    with device:
        check = SelfCheck(Network(spec), "retry", device)
    assert check.add().device == device


def leave_out_the_trial() -> None:
    """Without the passes before the first step, the passes of steps are easy to number."""
    trainer.try_full_batch = lambda *arguments: None


def train_with_flips(passes: tuple[int, ...], job: Job, run_dir: RunDir) -> dict[str, float]:
    """Train while bits flip: one in the remainder of column 2, level 1 on rank 1.

    ``passes``: the forward passes (from 0) in which it flips.
    """
    original = reversible.ReversibleRun.finish_forward
    count = 0

    def finish_forward(run: reversible.ReversibleRun, *arguments: Any) -> None:
        nonlocal count
        original(run, *arguments)
        if count in passes and os.environ["RANK"] == "1":
            assert run.saved is not None
            # Column 0 has no remainders.
            run.saved.remainders[4 * (2 - 1) + 1].view(-1)[3] ^= 4
        count += 1

    reversible.ReversibleRun.finish_forward = finish_forward  # type: ignore[method-assign]
    leave_out_the_trial()
    return staging.train(job, "pretrain", run_dir)


def train_with_overflow(forward_pass: int, job: Job, run_dir: RunDir) -> dict[str, float]:
    """Train while the output of column 1, level 2 is far too large in one forward pass."""
    original = Level.branch
    init = Level.__init__
    count = 0

    def numbered_init(level: Any, spec: Any, column: int, number: int) -> None:
        init(level, spec, column, number)
        level.number = (column, number)

    def branch(level: Any, *arguments: Any) -> torch.Tensor:
        nonlocal count
        affected = level.number == (1, 2)
        count += affected
        scale = 1e6 if affected and count == forward_pass else 1
        return original(level, *arguments) * scale

    Level.__init__ = numbered_init  # type: ignore[method-assign]
    Level.branch = branch  # type: ignore[method-assign]
    leave_out_the_trial()
    return staging.train(job, "pretrain", run_dir)


def train_without_faults(job: Job, run_dir: RunDir) -> dict[str, float]:
    return staging.train(job, "pretrain", run_dir)


def run(run_dir: RunDir, function: processes.Function, *arguments: Any) -> list[Any]:
    """Call a function with the run directory as its last argument, on two ranks."""
    return processes.run(run_dir.logs / "output", 2, function, *arguments, run_dir)


ENGINES = [
    {"zero_stage": 0, "precision": "fp32"},
    {"zero_stage": 1, "precision": "bf16"},
    {"zero_stage": 2, "precision": "bf16"},
    {"zero_stage": 3, "precision": "fp32"},
]


@pytest.fixture(
    scope="module",
    params=[*ENGINES[:2], *(pytest.param(e, marks=pytest.mark.slow) for e in ENGINES[2:])],
    ids=str,
)
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, dict[str, Any]]:
    """A run without faults, and the settings of its engine."""
    run_dir = staging.prepared_run(tmp_path_factory.mktemp("undisturbed"))
    results = run(run_dir, train_without_faults, job(**request.param))
    assert isinstance(results[0], dict), results
    return run_dir, request.param


def assert_same_run(a: RunDir, b: RunDir) -> None:
    staging.assert_same_weights(a, b)
    assert staging.losses(b) == staging.losses(a)


def test_retry_gives_the_weights_of_the_undisturbed_run(
    undisturbed: tuple[RunDir, dict[str, Any]], tmp_path: Path
) -> None:
    run_dir = staging.prepared_run(tmp_path)
    reference, engine = undisturbed
    results = run(run_dir, train_with_flips, (4,), job(**engine))
    assert isinstance(results[0], dict), results
    assert_same_run(reference, run_dir)
    messages = staging.events(run_dir, "message")
    (warning,) = [event.text for event in messages if event.level == "warning"]
    assert re.match(f"step 3: retrying: {ORIGIN}", warning), warning
    assert staging.scalars(run_dir, tags.RETRIED_STEPS) == [0, 0, 1, 1]
    mismatched = [count > 0 for count in staging.scalars(run_dir, tags.MISMATCHED_ELEMENTS)]
    assert mismatched == [False, False, True, False]
    assert all(0 < value < 100 for value in staging.scalars(run_dir, tags.MAX_ABS))
    assert staging.scalars(run_dir, tags.SKIPPED_STEPS) == [0] * STEPS


def test_stop_ends_all_ranks_before_the_update(
    undisturbed: tuple[RunDir, dict[str, Any]], tmp_path: Path
) -> None:
    run_dir = staging.prepared_run(tmp_path)
    reference, engine = undisturbed
    for error in run(run_dir, train_with_flips, (5,), job(**engine, on_mismatch="stop")):
        assert isinstance(error, StageError)
        assert "step 3 failed its self-check: column 2, level 1" in error.message
    results = run(run_dir, train_without_faults, job(**engine))
    assert isinstance(results[0], dict), results
    assert_same_run(reference, run_dir)


def test_warn_applies_the_update_and_logs_the_mismatch(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    results = run(run_dir, train_with_flips, (4,), job(on_mismatch="warn"))
    assert isinstance(results[0], dict), results
    warning = "mismatch ignored since step 3 (on_mismatch: warn): column 2, level 1"
    assert warning in staging.messages(run_dir)
    assert staging.scalars(run_dir, tags.SKIPPED_STEPS) == [0] * STEPS


def test_a_step_that_fails_every_retry_ends_the_stage(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    for error in run(run_dir, train_with_flips, tuple(range(4, 99)), job()):
        assert isinstance(error, StageError)
        assert "step 3 failed its self-check 4 times in a row" in error.message
        assert "on_mismatch: warn" in error.message
    assert staging.messages(run_dir).count("step 3: retrying") == 3


def test_an_overflow_skips_the_step_and_names_the_level(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    results = run(run_dir, train_with_overflow, 9, job())
    assert isinstance(results[0], dict), results
    messages = staging.messages(run_dir)
    assert "step 3: skipped: column 1, level 2: |value| is " in messages
    assert "fraction_bits below 18" in messages
    assert staging.scalars(run_dir, tags.SKIPPED_STEPS) == [0, 0, 1, 1]


def test_a_skipped_step_leaves_the_running_statistics_as_they_were(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    settings = staging.job({"max_steps": STEPS}, block="c2f", drop_path=0)
    run(run_dir, train_with_overflow, 3, settings)
    assert "step 2: skipped" in staging.messages(run_dir)
    variances = {
        name: float(value.max())
        for name, value in staging.weights(run_dir).items()
        if name.endswith("running_var")
    }
    assert variances
    assert max(variances.values()) < 1e3, variances
