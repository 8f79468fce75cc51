"""The state of the training loop in a checkpoint, as one typed record.

Reading it is also the one place that knows the keys of earlier versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pipeline.train.guard import GuardState
from pipeline.train.loss_scale import LossScaleState
from pipeline.train.metrics import MetricSums

# Keys of earlier versions -> the field that replaced them.
_RENAMED = {
    "optimizer_steps": "applied_steps",
    "repeated_steps": "retried_steps",
    "metrics": "metric_sums",
    "history": "evaluations",
    "figures": "last_metrics",
}


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a resumed run needs besides the tensors of the checkpoint."""

    identity: dict[str, object]  # what a run that resumes must agree with
    applied_steps: int  # optimizer updates; skipped steps are not among them
    world_size: int = 1  # of the group that wrote it; another one may resume
    retried_steps: int = 0
    replaced_samples: int = 0
    metric_sums: MetricSums | None = None  # since the last log
    evaluations: list[dict[str, float]] = field(default_factory=list)
    last_metrics: dict[str, float] = field(default_factory=dict)  # of the newest log
    loss_scale: LossScaleState = field(default_factory=dict)  # of fp16, else empty
    guard: GuardState = field(default_factory=GuardState)

    def to_json(self) -> dict[str, Any]:
        """The record as it lies in the manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> TrainingState:
        """Read the record of a manifest, of this version or an earlier one."""
        values = {_RENAMED.get(key, key): value for key, value in stored.items()}
        sums = values.get("metric_sums")
        if sums is not None:
            values["metric_sums"] = MetricSums(**sums)
        if "guard" in values:
            values["guard"] = GuardState(**values["guard"])
        known = {known.name for known in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass
class MetricsHistory:
    """Metrics of the stage so far: one entry per evaluation, and those of the newest log."""

    evaluations: list[dict[str, float]] = field(default_factory=list)
    last_metrics: dict[str, float] = field(default_factory=dict)
