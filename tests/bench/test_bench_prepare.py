"""``bench prepare`` on a few small images: the report is complete and the baseline is fair."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image as Pillow

from pipeline.bench import prepare
from pipeline.bench.photographs import photographs


def test_metrics_and_ratios_are_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare.main(tmp_path / "prepare.json", images=9, copies=2, rounds=1)
    report = json.loads((tmp_path / "prepare.json").read_text())
    assert [(case["preparer"], case["workers"]) for case in report["cases"]] == [
        ("ours", 1),
        ("pillow", 1),
        ("ours", 2),
        ("pillow", 2),
    ]
    assert {case["images"] for case in report["cases"]} == {17}
    rates = [case["images_per_s"] for case in report["cases"]]
    assert report["ratios"]["per_core"] == pytest.approx(rates[0] / rates[1])
    assert report["ratios"]["scaling"] == pytest.approx(rates[2] / rates[0])
    assert report["ratios"]["pillow_scaling"] == pytest.approx(rates[3] / rates[1])
    assert "images/s of ours / pillow, 1 worker:" in capsys.readouterr().out


def test_the_baseline_makes_images_of_the_same_size_as_the_preparation() -> None:
    image = photographs(1)[0].data
    small = Pillow.open(io.BytesIO(prepare.pillow_image(image, 128, 92)))
    assert min(small.size) == 128
    assert prepare.pillow_image(image, 5000, 92) == image
