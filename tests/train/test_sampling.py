"""Training in another order than the plain one, and on data of which some cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.data.dataset import open_dataset
from pipeline.data.order import GlobalOrder, RepeatedOrder, WindowedOrder
from pipeline.errors import DataError, Interrupted
from tests.data.small_datasets import damage
from tests.train import processes, staging

BAD = [2, 30, 31, 66]


def train(run_dir: Path, world: int, settings: dict[str, Any], *options: Any) -> list[Any]:
    return processes.run(
        run_dir / "logs", world, staging.train, staging.job(settings), "pretrain", run_dir, *options
    )


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    run_dir = staging.prepared(tmp_path)
    damage(open_dataset(run_dir / "stages/prepare/set").split("train"), BAD)
    return run_dir


def counts(run_dir: Path) -> list[float]:
    return [event.scalars["data/replaced_samples"] for event in staging.events(run_dir, "step")]


def test_damage_stops_training_by_name_and_then_it_goes_on_with_other_images_counted(
    damaged: Path,
) -> None:
    settings = {"epochs": 1, "checkpoint_every_steps": 1}
    first = int(next(i for i in range(67) if GlobalOrder(67, 0).index(0, i) in BAD)) // 16
    failed = train(damaged, 2, settings)
    assert any(
        isinstance(error, DataError) and "train-00000.parquet, row " in error.message
        for error in failed
    ), failed
    train(damaged, 2, settings | {"on_bad_sample": "replace"})
    replaced = [
        int(sum(GlobalOrder(67, 0).index(0, i) in BAD for i in range(16 * step)))
        for step in range(5)
    ]
    assert counts(damaged)[-1] == replaced[4]
    assert counts(damaged)[-(4 - first) :] == replaced[first + 1 :]
    said = staging.messages(damaged)
    assert (
        "another image in its place (on_bad_sample: replace): " in said
        and "checksum mismatch: the image changed after preparation" in said
    )


def test_windows_and_repeats_train_and_the_count_survives_an_interruption(damaged: Path) -> None:
    settings = {
        "order": "windowed",
        "window_shards": 1,
        "repeated_augmentation": 2,
        "epochs": 1,
        "on_bad_sample": "replace",
        "log_every_steps": 3,
    }
    stopped = train(damaged, 2, settings, staging.StopAfter(4, 0))
    assert all(
        isinstance(error, Interrupted) and "after step 5 of 8" in error.message for error in stopped
    ), stopped
    figures = train(damaged, 1, settings)[0]
    assert figures["steps"] == 2 * 67 // 16
    order = RepeatedOrder(WindowedOrder([67], 0, 1), 2, 16)
    replaced = [sum(order.index(0, i) % 67 in BAD for i in range(16 * step)) for step in (3, 6, 8)]
    assert counts(damaged) == replaced


def test_balanced_classes_train(tmp_path: Path) -> None:
    figures = train(staging.prepared(tmp_path), 1, {"balance": 1.0, "epochs": 1})[0]
    assert figures["steps"] == 67 // 16
