"""``bench published`` on a few photographs: both loaders deliver every image, and are compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.bench import published


def test_both_loaders_deliver_every_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published.main(
        tmp_path / "published.json", images=30, rounds=1, workers=(2,), batch=8, image_size=64
    )
    report = json.loads((tmp_path / "published.json").read_text())
    ours, timm = report["cases"]
    assert (ours["loader"], timm["loader"]) == ("ours", "timm")
    # All but the first batch, which is not measured.
    assert ours["images"] == timm["images"] >= 8
    assert report["ratios"]["2 workers"] == ours["images_per_s"] / timm["images_per_s"]
    assert "images/s of ours / timm, 2 workers:" in capsys.readouterr().out
