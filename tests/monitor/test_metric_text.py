"""One spelling of a metric, wherever it is shown."""

from __future__ import annotations

import pytest

from pipeline.metric_text import metric_text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("top1", 0.7621, "top-1 76.2%"),
        ("accuracy/top5", 0.931, "top-5 93.1%"),
        ("accuracy/train_top1", 0.5, "train top-1 50.0%"),
        ("balanced_accuracy", 0.25, "balanced accuracy 25.0%"),
        ("loss", 1.25, "loss 1.2500"),
        ("loss/total", 1.25, "loss 1.2500"),
        ("loss/validation", 1.25, "validation loss 1.2500"),
        ("images_per_s", 1234.56, "1,234.6 images/s"),
        ("throughput/images_per_s", 7.0, "7.0 images/s"),
        ("images", 50_000.0, "images 50,000"),
        ("reload_difference", 0.00012345, "reload difference 0.0001234"),
    ],
)
def test_a_metric_is_written_in_one_way(name: str, value: float, text: str) -> None:
    assert metric_text(name, value) == text
