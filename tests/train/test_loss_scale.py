"""The loss scale of fp16: what a checkpoint keeps of it, and when it explains an overflow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from pipeline.train.loss_scale import LossScale

OVERFLOWS = [True, True, False, False, False, True, False, False, True, True, True]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed logs on rank 0 of its process group, which does not exist here."""
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)


def scaler() -> DynamicLossScaler:
    return DynamicLossScaler(
        init_scale=2.0**4,
        scale_window=2,
        min_scale=1.0,
        delayed_shift=2,
        consecutive_hysteresis=False,
    )


def loss_scale(inner: Any) -> LossScale:
    engine: Any = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=inner))
    return LossScale(engine)


def test_a_resumed_scale_continues_as_the_uninterrupted_one() -> None:
    uninterrupted = scaler()
    scales = []
    for overflow in OVERFLOWS:
        uninterrupted.update_scale(overflow)
        scales.append(uninterrupted.cur_scale)
    assert len(set(scales)) > 2
    for stop in range(1, len(OVERFLOWS)):
        stopped = scaler()
        for overflow in OVERFLOWS[:stop]:
            stopped.update_scale(overflow)
        state = loss_scale(stopped).state()
        resumed = scaler()
        loss_scale(resumed).restore(state)
        later = []
        for overflow in OVERFLOWS[stop:]:
            resumed.update_scale(overflow)
            later.append(resumed.cur_scale)
        assert later == scales[stop:]


def test_at_the_smallest_scale_an_overflow_has_another_cause() -> None:
    inner = scaler()
    scale = loss_scale(inner)
    for _ in range(20):
        assert scale.explains_overflow == (inner.cur_scale > 1)
        inner.update_scale(True)  # DeepSpeed alone would raise at the minimum
    assert inner.cur_scale == 1
    assert not scale.explains_overflow


def test_other_precisions_have_no_scale() -> None:
    static = SimpleNamespace(dynamic=False, cur_scale=1.0)
    for scale in (loss_scale(static), LossScale(SimpleNamespace(optimizer=object()))):  # type: ignore[arg-type]
        assert scale.state() == {}
        scale.restore({"cur_scale": 8.0})
        assert not scale.explains_overflow
    assert static.cur_scale == 1.0
