"""The benchmark of the loaders, small."""

from __future__ import annotations

import json
import random
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.bench import loader
from pipeline.bench.loaders import CLASSES, LOADERS, Load
from pipeline.bench.photographs import photographs
from pipeline.bench.pillow import mix


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sources")
    assert loader.prepare_sources(directory, 24) >= 16
    return directory


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("recipe", loader.RECIPES)
def test_every_loader_delivers_the_same_kind_of_batch(
    name: str, recipe: str, sources: Path
) -> None:
    for seeded in (
        random.seed,
        np.random.seed,
        torch.manual_seed,
    ):  # of the usual loaders' mixes and workers
        seeded(0)
    load = Load(str(sources / "256"), recipe, workers=1, batch=8, image_size=64)
    delivery = LOADERS[name](load)
    with closing(delivery.batches) as batches:
        drawn = [
            tuple(part.clone() for part in delivery.finish(batch)) for batch in islice(batches, 4)
        ]  # more than an epoch
    for images, targets in drawn:
        assert images.shape == (8, 3, 64, 64) and images.dtype == torch.float32
        assert targets.shape == (8, CLASSES) and torch.allclose(
            targets.sum(1), torch.ones(8), atol=1e-4
        )
        assert images.mean().abs() < 1.5 and 0.05 < images.std() < 3.0
    hard = torch.cat([targets.max(1).values for _, targets in drawn]) > 0.999
    assert hard.all() if recipe == "crop_flip" else not hard.any()


@pytest.mark.parametrize("seed", range(20))
def test_the_usual_mix_is_of_whole_images_with_the_shares_of_the_targets(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    before, labels = torch.randn(6, 3, 16, 16), torch.arange(6)
    mixed, targets = mix(before.clone(), labels, classes=6)
    share = (targets[0, 0] - targets[0, 3]) / (
        targets[0, 0] + targets[0, 5] - 2 * targets[0, 3]
    )  # of the image itself
    cut = (mixed != before).any(1, keepdim=True).expand_as(mixed)
    if cut.all():
        assert torch.allclose(mixed, share * before + (1 - share) * before.flip(0), atol=1e-5)
    else:
        assert torch.equal(mixed, torch.where(cut, before.flip(0), before))
        assert float(share) == pytest.approx(1 - cut[0, 0].float().mean().item(), abs=1e-5)


def test_prints_figures_and_ratios_and_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "loader.json"
    settings = {"batch": 8, "image_size": 64}
    loader.main(
        target, 20, 0.1, 0.0, ("ours", "pillow"), (2,), ("256",), ("crop_flip",), **settings
    )
    result = json.loads(target.read_text())
    fields = {
        "loader",
        "workers",
        "source",
        "recipe",
        "images_per_s",
        "finished_images_per_s",
        "peak_mb",
    }
    assert len(result["cases"]) == 2 and all(set(case) == fields for case in result["cases"])
    ours, baseline = result["cases"]
    assert result["ratios"] == {
        "256/crop_flip": pytest.approx(ours["images_per_s"] / baseline["images_per_s"])
    }
    assert result["memory_ratios"] == {
        "256/crop_flip": pytest.approx(ours["peak_mb"] / baseline["peak_mb"])
    }
    assert all(case["peak_mb"] > 50 for case in result["cases"])
    assert "ours to pillow at 2 workers: 256/crop_flip" in capsys.readouterr().out


def test_photographs_are_made_up_where_there_are_none(tmp_path: Path) -> None:
    made = photographs(4, tmp_path)
    assert len({image.data for image in made}) == 4
    assert all(
        30_000 < len(image.data) < 300_000 and image.data[:3] == b"\xff\xd8\xff" for image in made
    )
