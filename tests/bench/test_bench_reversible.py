"""``bench reversible`` with small networks, and its chart."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.bench import reversible
from pipeline.bench.chart import ticks

FIELDS = {
    "mode",
    "block",
    "columns",
    "precision",
    "peak_mb",
    "step_s",
    "images_per_s",
    "gradient_error",
    "mismatched_elements",
}


@pytest.mark.slow
def test_every_mode_is_measured_and_written_as_table_json_and_chart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reversible.main(
        columns=(4, 8),
        modes=("stored", "exact"),
        json_path=tmp_path / "r.json",
        plot_path=tmp_path / "r.svg",
        rounds=2,
        batch=2,
        image_size=64,
        channels=(8, 16, 24, 32),
        depths=(1, 1, 1, 1),
        steps=1,
        seconds=0,
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert len(result["cases"]) == 4
    for case in result["cases"]:
        assert set(case) >= FIELDS
        assert case["mismatched_elements"] == 0
        assert case["gradient_error"] < 1e-3
        assert case["images_per_s"] == pytest.approx(2 / case["step_s"])
    assert result["slope_mb_per_column"]["exact"] < 0.05 * result["slope_mb_per_column"]["stored"]
    assert "MiB per column" in capsys.readouterr().out
    assert ElementTree.parse(tmp_path / "r.svg").getroot().tag.endswith("svg")


def test_ticks_are_round_numbers_that_cover_the_largest_value() -> None:
    assert ticks(230) == [0, 50, 100, 150, 200, 250]
    assert ticks(1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
