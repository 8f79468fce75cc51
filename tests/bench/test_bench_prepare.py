"""The benchmark of the preparation, small."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image as Pillow

from pipeline.bench import prepare
from pipeline.bench.photographs import photographs


def test_prints_figures_and_ratios_and_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare.main(tmp_path / "prepare.json", images=9, copies=2, rounds=1)
    result = json.loads((tmp_path / "prepare.json").read_text())
    assert [(case["preparer"], case["workers"]) for case in result["cases"]] == [
        ("ours", 1),
        ("pillow", 1),
        ("ours", 2),
        ("pillow", 2),
    ]
    assert {case["images"] for case in result["cases"]} == {17}
    rates = [case["images_per_s"] for case in result["cases"]]
    assert result["ratios"]["per_core"] == pytest.approx(rates[0] / rates[1])
    assert result["ratios"]["scaling"] == pytest.approx(rates[2] / rates[0])
    assert "per_core:" in capsys.readouterr().out


def test_the_pool_makes_what_ours_makes() -> None:
    image = photographs(1)[0].data
    small = Pillow.open(io.BytesIO(prepare.pillow_image(image, 128, 92)))
    assert min(small.size) == 128
    assert prepare.pillow_image(image, 5000, 92) == image
