"""``bench loader`` on a few small images: every loader delivers, and the report is complete."""

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
from pipeline.bench.loaders import CLASSES, LOADERS, Workload
from pipeline.bench.photographs import photographs
from pipeline.bench.pillow import mixup_or_cutmix


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
    # The usual loaders draw from the global generators, in workers and when they mix.
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    work = Workload(
        directory=str(sources / "256"), recipe=recipe, workers=1, batch=8, image_size=64
    )
    source = LOADERS[name](work)
    with closing(source.batches) as batches:
        finished = [
            tuple(part.clone() for part in source.finish(batch)) for batch in islice(batches, 4)
        ]  # more than an epoch
    for images, targets in finished:
        assert images.shape == (8, 3, 64, 64)
        assert images.dtype == torch.float32
        assert targets.shape == (8, CLASSES)
        assert torch.allclose(targets.sum(1), torch.ones(8), atol=1e-4)
        assert images.mean().abs() < 1.5
        assert 0.05 < images.std() < 3.0
    one_hot = torch.cat([targets.max(1).values for _, targets in finished]) > 0.999
    if recipe == "crop_flip":
        assert one_hot.all()
    else:
        assert not one_hot.any()


@pytest.mark.parametrize("seed", range(20))
def test_mixup_and_cutmix_of_the_baseline_match_their_targets(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    before = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(6)
    mixed, targets = mixup_or_cutmix(before.clone(), labels, classes=6)
    # Share of the image itself, from the targets of image 0 (mixed with 5; class 3 has the
    # smoothing only).
    smoothing = targets[0, 3]
    share = (targets[0, 0] - smoothing) / (targets[0, 0] + targets[0, 5] - 2 * smoothing)
    changed = (mixed != before).any(1, keepdim=True).expand_as(mixed)
    if changed.all():  # mixup
        assert torch.allclose(mixed, share * before + (1 - share) * before.flip(0), atol=1e-5)
    else:  # cutmix
        assert torch.equal(mixed, torch.where(changed, before.flip(0), before))
        expected = 1 - changed[0, 0].float().mean().item()
        assert float(share) == pytest.approx(expected, abs=1e-5)


def test_metrics_and_ratios_are_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "loader.json"
    loader.main(
        path,
        images=20,
        seconds=0.1,
        warm_up=0.0,
        loaders=("ours", "pillow"),
        workers=(2,),
        sources=("256",),
        recipes=("crop_flip",),
        batch=8,
        image_size=64,
    )
    report = json.loads(path.read_text())
    fields = {
        "loader",
        "workers",
        "source",
        "recipe",
        "images_per_s",
        "finished_images_per_s",
        "peak_mb",
    }
    assert len(report["cases"]) == 2
    assert all(set(case) == fields for case in report["cases"])
    ours, baseline = report["cases"]
    for name, metric in (
        ("ratios", "images_per_s"),
        ("finished_ratios", "finished_images_per_s"),
        ("memory_ratios", "peak_mb"),
    ):
        expected = pytest.approx(ours[metric] / baseline[metric])
        assert report[name] == {"256/crop_flip": expected}, name
    assert all(case["peak_mb"] > 50 for case in report["cases"])
    printed = capsys.readouterr().out
    assert "images/s, ours / pillow at 2 workers: 256/crop_flip" in printed
    assert "peak memory, ours / pillow at 2 workers: 256/crop_flip" in printed


def test_synthetic_images_replace_missing_photographs(tmp_path: Path) -> None:
    images = photographs(4, tmp_path)
    assert len({image.data for image in images}) == 4
    for image in images:
        assert 30_000 < len(image.data) < 300_000
        assert image.data[:3] == b"\xff\xd8\xff"
