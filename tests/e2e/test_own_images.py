"""The job for one's own images, on a folder that holds very few of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.job_runs import ROOT, finish, start

pytestmark = pytest.mark.slow


def photographs(root: Path, classes: int, count: int) -> Path:
    """Class folders of different JPEGs of 72 x 54 pixels."""
    generator = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"class {label}"
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 255, (6, 8, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((72, 54), Image.Resampling.BICUBIC)
            image.save(folder / f"{number}.jpg")
    return root


def test_twelve_photographs_pass_every_stage_of_two_columns_with_a_fine_stem(
    tmp_path: Path,
) -> None:
    images = photographs(tmp_path / "images", classes=4, count=3)
    run_dir = tmp_path / "run"
    options = [f"data.root={images}", "stages.pretrain.epochs=3", "cluster.device=cpu"]
    arguments = [word for option in options for word in ("--set", option)]
    job = ROOT / "jobs" / "own_images.yaml"
    code, out = finish(start(job, *arguments, "--run-dir", str(run_dir)))
    assert code == 0, out
    description = json.loads((run_dir / "export" / "model.json").read_text())
    network = description["network"]
    assert (network["columns"], network["stem_stride"]) == (2, 2)
    assert description["preprocessing"]["image_size"] == 48  # 54 pixels are not enlarged
    # The published code has neither this stem nor this block, so the export has no file for it.
    assert not (run_dir / "export" / "revcol.pth").exists()
