"""Training in an order other than the default, and on data that is partly unreadable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.dataset import open_dataset
from pipeline.data.order import GlobalOrder, RepeatedOrder, WindowedOrder
from pipeline.errors import DataError, Interrupted
from pipeline.layout import RunDir
from pipeline.monitor import tags
from tests.data.small_datasets import damage
from tests.train import staging

BAD = [2, 30, 31, 66]  # samples that cannot be read


def train(
    run_dir: RunDir,
    world_size: int,
    settings: dict[str, Any],
    stop: Callable[[], bool] | None = None,
) -> list[Any]:
    """Run the stage 'pretrain'; what each rank returned or raised."""
    return staging.run_stage(run_dir, world_size, staging.job(settings), stop=stop)


@pytest.fixture
def damaged(tmp_path: Path) -> RunDir:
    run_dir = staging.prepared_run(tmp_path)
    damage(open_dataset(run_dir.dataset(staging.DATASET)).split("train"), BAD)
    return run_dir


def replaced(run_dir: RunDir) -> list[float]:
    """Samples replaced so far, at every logged step."""
    return staging.scalars(run_dir, tags.REPLACED_SAMPLES)


def test_a_bad_sample_stops_training_unless_the_job_replaces_it(damaged: RunDir) -> None:
    settings = {"epochs": 1, "checkpoint_every_steps": 1}
    order = GlobalOrder(staging.TRAIN, 0)
    bad_positions = [i for i in range(staging.TRAIN) if order.index(0, i) in BAD]
    # 1. Stop, the default: the error names file and row.
    failed = train(damaged, 2, settings)
    messages = [error.message for error in failed if isinstance(error, DataError)]
    assert any("train-00000.parquet, row " in message for message in messages), failed
    # 2. Replace: training resumes and counts the samples.
    train(damaged, 2, settings | {"on_bad_sample": "replace"})
    expected = [sum(position < 16 * step for position in bad_positions) for step in range(5)]
    first_bad_step = bad_positions[0] // 16
    assert replaced(damaged)[-1] == expected[4]
    assert replaced(damaged)[-(4 - first_bad_step) :] == expected[first_bad_step + 1 :]
    log = staging.messages(damaged)
    assert f"sample replaced since step {first_bad_step + 1} (on_bad_sample: replace): " in log
    assert "checksum mismatch: the image changed after preparation" in log


def test_the_count_of_replaced_samples_survives_an_interruption(damaged: RunDir) -> None:
    settings = {
        "order": "windowed",
        "window_shards": 1,
        "repeated_augmentation": 2,
        "epochs": 1,
        "on_bad_sample": "replace",
        "log_every_steps": 3,
    }
    stopped = train(damaged, 2, settings, staging.StopAfter(4, 0))
    for error in stopped:
        assert isinstance(error, Interrupted), stopped
        assert "after step 5 of 8" in error.message
    (metrics,) = train(damaged, 1, settings)
    assert metrics["steps"] == 2 * staging.TRAIN // 16
    order = RepeatedOrder(WindowedOrder([staging.TRAIN], 0, 1), 2, 16)
    views = [order.index(0, i) for i in range(16 * 8)]
    bad = [view % staging.TRAIN in BAD for view in views]
    assert replaced(damaged) == [sum(bad[: 16 * step]) for step in (3, 6, 8)]


def test_a_balanced_order_trains_an_epoch(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    (metrics,) = train(run_dir, 1, {"balance": 1.0, "epochs": 1})
    assert metrics["steps"] == staging.TRAIN // 16
