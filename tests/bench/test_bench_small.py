"""``bench small`` with tiny numbers: equal images, equal time, and a complete report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from pipeline.bench import small, small_networks
from pipeline.bench.small_images import TEST, TRAIN, Subset, load_split, write_subset
from pipeline.errors import ConfigError, DataError
from tests.prepare.source_folders import class_tars, images, write_tar

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 2.0  # seconds


def subset(classes: int = 2, train: int = 5, test: int = 3) -> Subset:
    return Subset(classes=classes, images_per_class=train, test_images_per_class=test)


def names(folder: Path) -> list[str]:
    """Names in the source, without the number in front."""
    return sorted(path.name.partition("-")[2] for path in folder.iterdir())


def test_the_first_images_of_the_first_classes_are_taken(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for label in (2, 0, 1):
        shuffled = dict(reversed(list(images(label, 9).items())))
        write_tar(source / "train" / f"c{label}.tar", shuffled)
        write_tar(source / "test" / f"c{label}.tar", images(label, 4, first=500))
    counts = write_subset(str(source), tmp_path / "target", subset())
    assert counts == {TRAIN: 10, TEST: 6}
    assert sorted(path.name for path in (tmp_path / "target" / TRAIN).iterdir()) == ["c0", "c1"]
    for label in (0, 1):
        first = sorted(images(label, 9))[:5]
        assert names(tmp_path / "target" / TRAIN / f"c{label}") == first
        tested = sorted(images(label, 4, first=500))[:3]
        assert names(tmp_path / "target" / TEST / f"c{label}") == tested


def test_too_few_classes_and_missing_test_images_are_refused(tmp_path: Path) -> None:
    class_tars(tmp_path / "two", classes=2)
    with pytest.raises(DataError, match="has 2 classes, 3 are wanted") as caught:
        write_subset(str(tmp_path / "two"), tmp_path / "a", subset(classes=3))
    assert caught.value.remedy == "--classes 2"
    class_tars(tmp_path / "one split", classes=2, validation=0)
    with pytest.raises(DataError, match="has no separate test images"):
        write_subset(str(tmp_path / "one split"), tmp_path / "b", subset())


def test_an_unknown_network_is_refused_before_anything_runs() -> None:
    bench = small.SmallBench(subset=subset(), networks=["cnn", "vgg"])
    with pytest.raises(ConfigError, match="knows no network 'vgg'") as caught:
        small.main(bench)
    assert caught.value.remedy == "choose from: cnn, resnet18"


def coloured_classes(folder: Path, count: int) -> None:
    """A red and a blue class, in noise."""
    random = np.random.default_rng(0)
    for label in range(2):
        (folder / f"c{label}").mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 100, (16, 16, 3))
            pixels[:, :, 2 * label] += 120
            Pillow.fromarray(pixels.astype(np.uint8)).save(folder / f"c{label}" / f"{number}.png")


def case(folder: Path, network: str, **changes: float) -> small_networks.SmallCase:
    values = {"seed": 0, "seconds": BUDGET, "threads": 1, "image_size": 16, "mixup": 0.0} | changes
    return small_networks.SmallCase(
        network=network,
        directory=str(folder),
        batch=8,
        **values,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("mixup", [0.0, 0.2])
def test_the_plain_cnn_learns_within_its_budget(mixup: float, tmp_path: Path) -> None:
    coloured_classes(tmp_path / TRAIN, 16)
    coloured_classes(tmp_path / TEST, 8)
    metrics = small_networks.measure(case(tmp_path, "cnn", mixup=mixup))
    assert metrics["top1"] == 1
    assert metrics["parameters"] == 140_002
    seconds = [point["seconds"] for point in metrics["curve"]]
    assert seconds == sorted(seconds)
    assert seconds[-1] == metrics["seconds"] >= BUDGET
    assert all(earlier < BUDGET for earlier in seconds[:-1])


def test_augmentation_flips_and_shifts_and_keeps_the_rest() -> None:
    image = torch.arange(1, 257, dtype=torch.uint8).view(1, 1, 16, 16)  # 256 becomes 0
    batch = image.expand(64, 3, 16, 16)
    out = small_networks.augment(batch, torch.Generator().manual_seed(0))
    assert out.shape == batch.shape
    assert out.dtype == torch.uint8
    centres = {tuple(picture[0, 8, 8:10].tolist()) for picture in out}
    steps = {right - left for left, right in centres}
    assert steps == {1, -1}  # as they were, and flipped
    assert len(centres) > 20  # 5 x 5 shifts, two directions


def test_the_learning_rate_rises_once_and_falls_to_zero() -> None:
    rates = [small_networks.one_cycle(step / 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == rates[15] == pytest.approx(1)
    assert rates[:16] == sorted(rates[:16])
    assert rates[15:] == sorted(rates[15:], reverse=True)
    assert rates[100] == pytest.approx(0)


@pytest.mark.parametrize(("image_size", "stride"), [(32, 1), (96, 2)])
def test_resnet_keeps_the_resolution_of_small_images(image_size: int, stride: int) -> None:
    network = small_networks.resnet18(classes=3, image_size=image_size)
    first = network.conv1
    assert isinstance(first, torch.nn.Conv2d)
    assert first.stride == (stride, stride)
    assert isinstance(network.maxpool, torch.nn.Identity) == (stride == 1)
    assert network(torch.zeros(2, 3, image_size, image_size)).shape == (2, 3)


def test_images_are_read_as_in_evaluation(tmp_path: Path) -> None:
    coloured_classes(tmp_path, 3)
    read, labels = load_split(tmp_path, 16)
    assert read.shape == (6, 3, 16, 16)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    with Pillow.open(tmp_path / "c1" / "2.png") as picture:
        assert np.array_equal(read[5].permute(1, 2, 0).numpy(), np.asarray(picture))


def bench_small(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "bench", "small", "--seeds", "1", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "CIFAR10"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_command_compares_the_job_with_a_network(tmp_path: Path) -> None:
    report_path = tmp_path / "small.json"
    arguments = ["--classes", "2", "--images-per-class", "24", "--test-images-per-class", "4"]
    arguments += ["--networks", "cnn", "--seconds", "1", "--json", str(report_path)]
    arguments += ["--set", "stages.pretrain.max_steps=1"]
    done = bench_small(*arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads(report_path.read_text())
    assert report["source"] == "synthetic images"
    assert report["images"] == {TRAIN: 48, TEST: 8}
    job, cnn = report["cases"]
    assert [job["network"], cnn["network"]] == ["own_images", "cnn"]
    for result in (job, cnn):
        assert result["curve"][-1] == {"seconds": result["seconds"], "top1": result["top1"]}
        assert result["top1"] * 8 == pytest.approx(round(result["top1"] * 8))
        line = report["summary"][result["network"]]
        assert line["top1_min"] == line["top1_median"] == line["top1_max"] == result["top1"]
    assert "pretrain 1 steps" in job["design"]
    assert len(job["curve"]) >= 2
    assert 0 < job["curve"][0]["seconds"] < job["seconds"]
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "network",
        "own_images",
        "cnn",
    ]


def test_a_failing_job_ends_the_benchmark() -> None:
    arguments = ["--classes", "2", "--images-per-class", "1", "--test-images-per-class", "1"]
    done = bench_small(*arguments, "--networks", "cnn", "--set", "no_such_key=1")
    assert done.returncode == 3
    assert "bench small: the job own_images ended with exit code 2" in done.stderr
    assert "no_such_key" in done.stderr
