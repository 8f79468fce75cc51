"""The loss scale of fp16: a factor that keeps small gradients above the smallest fp16 number.

DeepSpeed starts with 2^16 and doubles it after 1000 steps without an overflow. A step whose
gradients overflow is skipped, and the scale is halved after the second one. So such a step is no
fault, unless the scale is at its minimum already."""

from __future__ import annotations

from typing import Any

from pipeline.train.engine import SMALLEST_LOSS_SCALE, DeepSpeedEngine

# Attributes of DeepSpeed's scaler that decide about the next steps.
_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

LossScaleState = dict[str, float]


class LossScale:
    """The scaler of an engine. Without fp16 it does nothing: ``state`` is empty."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
        self._scaler = scaler if getattr(scaler, "dynamic", False) else None
        if self._scaler is not None:
            # At the minimum DeepSpeed would raise an exception without a remedy; the guard ends
            # such a run with a report.
            self._scaler.raise_error_at_min_scale = False

    def state(self) -> LossScaleState:
        """What a checkpoint needs, so that a resumed run scales as an uninterrupted one."""
        if self._scaler is None:
            return {}
        return {name: getattr(self._scaler, name) for name in _STATE}

    def restore(self, state: LossScaleState) -> None:
        """Continue from a state; an empty one (of another precision) changes nothing."""
        if self._scaler is not None:
            for name, value in state.items():
                setattr(self._scaler, name, value)

    @property
    def explains_overflow(self) -> bool:
        """True if gradients may overflow because of the scale alone: a smaller one may help."""
        return self._scaler is not None and self._scaler.cur_scale > SMALLEST_LOSS_SCALE
