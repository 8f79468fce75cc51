"""The record of the training loop in a checkpoint, of this version and of earlier ones."""

from __future__ import annotations

import json

from pipeline.train.metrics import MetricSums
from pipeline.train.training_state import TrainingState

STATE = TrainingState(
    identity={"seed": 1},
    applied_steps=9,
    retried_steps=2,
    replaced_samples=3,
    metric_sums=MetricSums([1.5, 0.0], 4),
    evaluations=[{"step": 5, "top1": 0.25}],
    last_metrics={"loss": 0.5},
)


def test_the_record_survives_json() -> None:
    assert TrainingState.from_json(json.loads(json.dumps(STATE.to_json()))) == STATE


def test_keys_of_the_version_before_are_read() -> None:
    old = {
        "identity": {"seed": 1},
        "optimizer_steps": 9,
        "repeated_steps": 2,
        "replaced_samples": 3,
        "metrics": {"sums": [1.5, 0.0], "count": 4},
        "history": [{"step": 5, "top1": 0.25}],
        "figures": {"loss": 0.5},
    }
    assert TrainingState.from_json(old) == STATE


def test_counts_that_older_versions_did_not_write_are_zero() -> None:
    state = TrainingState.from_json({"identity": {}, "optimizer_steps": 9})
    assert state == TrainingState(identity={}, applied_steps=9)
    assert state.replaced_samples == 0
