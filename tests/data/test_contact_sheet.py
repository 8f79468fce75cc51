"""The contact sheet shows the pixels of training, for a job file, a run or a dataset."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image as Pillow
from typer.testing import CliRunner

from pipeline import cli
from pipeline.config.schema import AugmentConfig
from pipeline.data.contact_sheet import Settings, contact_sheet
from pipeline.data.dataset import open_dataset
from pipeline.data.decode import Image
from pipeline.data.device import DeviceAugment
from pipeline.data.loader import TrainLoader
from pipeline.data.sheet import CAPTION_HEIGHT, GAP, HEADER_HEIGHT, LABEL_WIDTH, png
from pipeline.errors import ConfigError, DataError
from pipeline.orchestrate.inspect_target import find
from tests.data.small_datasets import jpeg, make_dataset

SIDE = 128  # pixels; images of this size are shown without scaling
ROW_HEIGHT = SIDE + CAPTION_HEIGHT + GAP
JOB = """
name: small
seed: 5
model: revcol_cifar
data: {root: images}
stages:
  prepare: {}
  pretrain: {image_size: 32, epochs: 4, global_batch: 16, base_lr: 1e-3, augment: {randaugment: 5}}
  finetune:
    {from: pretrain, image_size: 64, epochs: 2, global_batch: 16, base_lr: 1e-3,
     augment: {mixup: 0}}
"""


def cell(sheet: Image, row: int, column: int) -> Image:
    top = HEADER_HEIGHT + row * ROW_HEIGHT
    left = LABEL_WIDTH + column * (SIDE + GAP)
    return sheet[top : top + SIDE, left : left + SIDE]


def test_the_sheet_shows_the_pixels_of_loader_and_device(tmp_path: Path) -> None:
    data = make_dataset(tmp_path, {"train": 40}, size=(SIDE, 96))
    split = data.split("train")
    augment = AugmentConfig()
    sheet = contact_sheet(data, Settings(SIDE, augment, 7), epoch=1, rows=6, epochs=2)
    loaded = {}
    with TrainLoader(
        split,
        seed=7,
        image_size=SIDE,
        augment=augment,
        global_batch=20,
        micro_batch=20,
        start_step=2,
    ) as loader:
        for batch in islice(loader, 2):
            assert batch.epoch == 1
            loaded |= {
                sample: image.clone()
                for sample, image in zip(batch.samples.tolist(), batch.images, strict=True)
            }
    samples = torch.tensor([0, 7, 15, 23, 31, 39])
    images = torch.stack([loaded[sample] for sample in samples.tolist()])
    device = DeviceAugment(augment, len(data.classes), 7, train=True)
    labels = torch.from_numpy(split.labels[samples.numpy()])
    network_input = device(images, labels, samples, torch.arange(6), 1)
    pixels = network_input.image01().permute(0, 2, 3, 1).numpy() * 255
    for row, sample in enumerate(samples.tolist()):
        assert np.array_equal(cell(sheet, row, 1), images[row].numpy())
        # Another epoch has another augmentation.
        assert not np.array_equal(cell(sheet, row, 2), images[row].numpy())
        assert np.abs(cell(sheet, row, 3) - pixels[row]).max() <= 0.51
        stored = cell(sheet, row, 0)[16:112]
        original = simplejpeg.decode_jpeg(jpeg(sample, SIDE, 96))
        assert np.abs(stored.astype(int) - original).mean() < 3
    labels_column = sheet[HEADER_HEIGHT:, : LABEL_WIDTH - GAP]
    for row in range(6):
        assert (labels_column[row * ROW_HEIGHT :][:SIDE] < 100).any(), f"row {row} has no name"


def test_the_sheet_is_a_function_of_its_arguments(tmp_path: Path) -> None:
    data = make_dataset(tmp_path, {"train": 12})
    settings = Settings(32, AugmentConfig(), 0)
    first = png(contact_sheet(data, settings, epoch=0, rows=3))
    assert png(contact_sheet(data, settings, epoch=0, rows=3)) == first
    assert png(contact_sheet(data, settings, epoch=1, rows=3)) != first
    with Pillow.open(io.BytesIO(first)) as opened:
        assert opened.format == "PNG"
    few = contact_sheet(make_dataset(tmp_path / "one", {"train": 1}, classes=2), settings, rows=8)
    assert few.shape[0] == HEADER_HEIGHT + ROW_HEIGHT


def test_long_and_foreign_names_and_small_and_large_images_fit(tmp_path: Path) -> None:
    data = make_dataset(tmp_path, {"train": 8}, classes=2, size=(400, 40))
    data.class_names = [
        "a name so long that no row could ever hold it, however narrow " * 3,
        "Zaunkönig 鷦鷯",
    ]
    for size in (32, 96, 224):
        sheet = contact_sheet(data, Settings(size, AugmentConfig(), 0), rows=2)
        assert (sheet[:, -GAP + 1 :] == sheet[-1, -1]).all(), "text runs over the edge"


def test_missing_and_undecodable_images_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no training image"):
        contact_sheet(
            make_dataset(tmp_path / "none", {"train": 0}), Settings(32, AugmentConfig(), 0)
        )
    data = make_dataset(tmp_path / "bad", {"train": 1})
    offset = int(data.split("train")._indexes[0][0, 0])
    with open(tmp_path / "bad" / "train-00000.parquet", "r+b") as file:
        file.seek(offset)
        file.write(b"\0" * 16)
    with pytest.raises(
        DataError,
        match=r"train-00000.parquet, row 0: checksum mismatch: the image changed after preparation",
    ):
        contact_sheet(data, Settings(32, AugmentConfig(), 0))


def test_find_accepts_job_files_runs_and_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    run = tmp_path / "runs" / "small"
    runs = Path("runs")
    dataset = run / "stages" / "prepare" / "images"
    make_dataset(dataset, {"train": 20})
    for job in (tmp_path / "small.yaml", run / "run.yaml"):
        job.write_text(JOB)
    for name in ("small.yaml", "small", "runs/small", dataset):
        target = find(Path(name), runs)
        assert (target.dataset.absolute(), target.stage) == (dataset, "pretrain")
        assert (target.settings.image_size, target.settings.seed) == (32, 5)
        assert target.settings.augment.randaugment == 5
        assert find(Path(name), runs, "finetune").settings.augment.mixup == 0
        overrides = ["seed=6", "stages.pretrain.augment.randaugment=0"]
        changed = find(Path(name), runs, overrides=overrides).settings
        assert (changed.seed, changed.augment.randaugment) == (6, 0)
    make_dataset(tmp_path / "alone", {"train": 3})
    assert find(Path("alone"), runs).settings == Settings(224, AugmentConfig(), 0)
    with pytest.raises(ConfigError, match="no job is known that has the stage 'pretrain'"):
        find(Path("alone"), runs, "pretrain")
    with pytest.raises(ConfigError, match="no job is known that has the setting seed=6"):
        find(Path("alone"), runs, overrides=["seed=6"])
    with pytest.raises(ConfigError, match="did you mean 'seed'"):
        find(Path("small"), runs, overrides=["sed=6"])
    with pytest.raises(
        DataError,
        match=r"nothing: is no job file, run or prepared dataset\n  -> .*runs here: small",
    ):
        find(Path("nothing"), runs)


def test_the_command_writes_a_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / "set", {"train": 9})
    done = CliRunner().invoke(
        cli.app, ["data", "show", "set", "--out", "a/sheet.png", "--epoch", "3", "--rows", "2"]
    )
    assert done.exit_code == 0, done.output
    assert done.output.startswith("a/sheet.png: ")
    with Pillow.open(tmp_path / "a" / "sheet.png") as opened:
        opened.load()
    assert CliRunner().invoke(cli.app, ["data", "show", "set", "--epoch", "0"]).exit_code == 2


def test_the_command_counts_epochs_from_1_and_takes_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "small.yaml").write_text(JOB)
    make_dataset(tmp_path / "runs/small/stages/prepare/images", {"train": 6})

    def sheet(*arguments: str) -> bytes:
        command = ["data", "show", "small.yaml", "--rows", "2", *arguments]
        assert CliRunner().invoke(cli.app, command, catch_exceptions=False).exit_code == 0
        return (tmp_path / "data.png").read_bytes()

    target = find(Path("small.yaml"), Path("runs"))
    first = png(contact_sheet(open_dataset(target.dataset), target.settings, epoch=0, rows=2))
    assert sheet() == first
    assert sheet("--epoch", "1") == first
    assert sheet("--set", "stages.pretrain.augment.flip=0") != first
