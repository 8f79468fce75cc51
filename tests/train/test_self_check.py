"""Wrong arithmetic in a training stage: the step is repeated as if nothing had happened, told of, or the end."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.schema import Job
from pipeline.errors import StageError
from pipeline.model import reversible
from pipeline.model.column import Level
from tests.train import processes, staging

STEPS = 4
PLACE = r"column 2, level 1: \d+ elements differ from the forward pass( \(and \d+ more findings\))?, on rank 1, host \S"


def job(**pretrain: Any) -> Job:
    """Two micro-batches a step on each of two ranks."""
    return staging.job(
        pretrain={"micro_batch": 4, "max_steps": STEPS, "checkpoint_every_steps": 2} | pretrain
    )


def train_with_flips(calls: tuple[int, ...], job: Job, run_dir: Path) -> dict[str, float]:
    """A stage in which a bit of the remainder of column 2, level 1 flips on rank 1, in these forward passes (from 0)."""
    original, passes = reversible.ExactColumns.forward, [0]

    def forward(ctx: Any, *arguments: Any) -> Any:
        save = ctx.save_for_backward

        def flipping(x: torch.Tensor, *kept: torch.Tensor) -> None:
            if passes[0] in calls and os.environ["RANK"] == "1":
                kept[4 + 4 + 1].view(-1)[3] ^= 4
            passes[0] += 1
            save(x, *kept)

        ctx.save_for_backward = flipping
        return original(ctx, *arguments)

    reversible.ExactColumns.forward = staticmethod(forward)  # type: ignore[method-assign]
    return staging.train(job, "pretrain", run_dir)


def train_with_overflow(call: int, job: Job, run_dir: Path) -> dict[str, float]:
    """A stage in which F of column 1, level 2 is far too large in one forward pass."""
    original, init, passes = Level.branch, Level.__init__, [0]

    def placed(level: Any, spec: Any, column: int, number: int) -> None:
        init(level, spec, column, number)
        level.place = column, number

    def branch(level: Any, *arguments: Any) -> torch.Tensor:
        passes[0] += level.place == (1, 2)
        return original(level, *arguments) * (
            1e6 if level.place == (1, 2) and passes[0] == call else 1
        )

    Level.__init__, Level.branch = placed, branch  # type: ignore[method-assign]
    return staging.train(job, "pretrain", run_dir)


ENGINES = [
    {"zero_stage": stage, "precision": precision}
    for stage, precision in enumerate(("fp32", "bf16", "bf16", "fp32"))
]


@pytest.fixture(
    scope="module",
    params=[*ENGINES[:2], *(pytest.param(e, marks=pytest.mark.slow) for e in ENGINES[2:])],
    ids=str,
)
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    run_dir = staging.prepared(tmp_path_factory.mktemp("undisturbed"))
    results = processes.run(
        run_dir / "logs", 2, staging.train, job(**request.param), "pretrain", run_dir
    )
    assert isinstance(results[0], dict), results
    return run_dir, request.param


def assert_same(a: Path, b: Path) -> None:
    found, expected = staging.weights(b), staging.weights(a)
    assert all(torch.equal(found[name], value) for name, value in expected.items()) and len(
        found
    ) == len(expected)
    assert staging.losses(b) == staging.losses(a)


def test_redo_gives_the_parameters_of_the_undisturbed_run(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run_dir, (reference, engine) = staging.prepared(tmp_path), undisturbed
    results = processes.run(run_dir / "logs", 2, train_with_flips, (4,), job(**engine), run_dir)
    assert isinstance(results[0], dict), results
    assert_same(reference, run_dir)
    (said,) = [
        event.text for event in staging.events(run_dir, "message") if event.level == "warning"
    ]
    assert re.match(f"step 3 is repeated: {PLACE}", said), said
    steps = {event.step: event.scalars for event in staging.events(run_dir, "step")}
    assert [steps[s]["reversible/repeated_steps"] for s in range(1, STEPS + 1)] == [0, 0, 1, 1]
    assert [steps[s]["reversible/mismatched_elements"] > 0 for s in range(1, STEPS + 1)] == [
        False,
        False,
        True,
        False,
    ]
    assert all(
        0 < steps[s]["reversible/largest_value"] < 100 and steps[s]["optim/skipped_steps"] == 0
        for s in steps
    )


def test_stop_ends_all_ranks_before_the_step_is_taken(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run_dir, (reference, engine) = staging.prepared(tmp_path), undisturbed
    stopped = processes.run(
        run_dir / "logs", 2, train_with_flips, (5,), job(**engine, on_mismatch="stop"), run_dir
    )
    assert all(
        isinstance(error, StageError) and "step 3 is wrong: column 2, level 1" in error.message
        for error in stopped
    )
    results = processes.run(run_dir / "logs", 2, staging.train, job(**engine), "pretrain", run_dir)
    assert isinstance(results[0], dict), results
    assert_same(reference, run_dir)


def test_warn_takes_the_step_and_tells(tmp_path: Path) -> None:
    run_dir = staging.prepared(tmp_path)
    results = processes.run(
        run_dir / "logs", 2, train_with_flips, (4,), job(on_mismatch="warn"), run_dir
    )
    assert isinstance(results[0], dict), results
    assert "trained regardless (on_mismatch: warn): column 2, level 1" in staging.messages(run_dir)
    assert [event.scalars["optim/skipped_steps"] for event in staging.events(run_dir, "step")] == [
        0
    ] * STEPS


def test_a_step_that_stays_wrong_is_the_end(tmp_path: Path) -> None:
    run_dir = staging.prepared(tmp_path)
    failed = processes.run(
        run_dir / "logs", 2, train_with_flips, tuple(range(4, 99)), job(), run_dir
    )
    assert all(
        isinstance(error, StageError) and "4 times in a row" in error.message for error in failed
    ), failed
    assert (
        "on_mismatch: warn" in failed[0].message
        and staging.messages(run_dir).count("is repeated") == 3
    )


def test_an_overflow_leaves_the_step_out_and_says_where(tmp_path: Path) -> None:
    run_dir = staging.prepared(tmp_path)
    results = processes.run(run_dir / "logs", 2, train_with_overflow, 9, job(), run_dir)
    assert isinstance(results[0], dict), results
    assert "step 3 is left out: column 1, level 2: |value| is " in staging.messages(run_dir)
    assert "fraction_bits below 18" in staging.messages(run_dir)
    assert [event.scalars["optim/skipped_steps"] for event in staging.events(run_dir, "step")] == [
        0,
        0,
        1,
        1,
    ]
