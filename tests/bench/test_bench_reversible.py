"""The benchmark of the modes, small."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.bench import reversible


@pytest.mark.slow
def test_measures_every_mode_and_writes_its_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "batch": 2,
        "image_size": 64,
        "channels": (8, 16, 24, 32),
        "depths": (1, 1, 1, 1),
        "steps": 1,
        "seconds": 0,
    }
    reversible.main(
        (4, 8), ("stored", "exact"), tmp_path / "r.json", tmp_path / "r.svg", rounds=2, **options
    )
    result = json.loads((tmp_path / "r.json").read_text())
    fields = {
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
    assert len(result["cases"]) == 4 and all(fields <= set(case) for case in result["cases"])
    assert result["slope_mb_per_column"]["exact"] < 0.05 * result["slope_mb_per_column"]["stored"]
    assert all(
        case["mismatched_elements"] == 0 and case["gradient_error"] < 1e-3
        for case in result["cases"]
    )
    assert all(
        case["images_per_s"] == pytest.approx(2 / case["step_s"]) for case in result["cases"]
    )
    assert "MiB a column" in capsys.readouterr().out
    assert ElementTree.parse(tmp_path / "r.svg").getroot().tag.endswith("svg")
