"""Learning rates of the published recipes."""

from __future__ import annotations

import pytest

from pipeline.config.schema import TrainConfig
from pipeline.train.schedule import Schedule


def test_the_rate_scales_with_the_batch_warms_up_and_follows_a_cosine() -> None:
    config = TrainConfig(
        epochs=10,
        base_lr=1e-3,
        base_lr_batch=1024,
        global_batch=2048,
        warmup_epochs=2,
        warmup_lr=1e-5,
        min_lr=1e-6,
    )
    schedule = Schedule.of(config, images=50 * 2048 + 7)
    assert schedule.total_steps == 500
    assert schedule.warmup_steps == 100
    assert schedule(0) == pytest.approx(2e-5)
    assert schedule(50) == pytest.approx((2e-5 + 2e-3) / 2)
    assert schedule(100) == pytest.approx(2e-3)
    assert schedule(300) == pytest.approx(2e-6 + (2e-3 - 2e-6) / 2)
    assert schedule(500) == pytest.approx(2e-6)
    rates = [schedule(step) for step in range(100, 500)]
    assert rates == sorted(rates, reverse=True)


def test_a_schedule_cut_by_max_steps_still_ends_at_the_minimum() -> None:
    config = TrainConfig(epochs=90, base_lr=1e-3, warmup_epochs=5, max_steps=8)
    schedule = Schedule.of(config, images=100 * config.global_batch)
    assert schedule.total_steps == 8
    assert schedule.warmup_steps == 7
    assert schedule(8) == pytest.approx(config.min_lr)
