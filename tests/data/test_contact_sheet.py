"""The contact sheet shows what training sees: the loader's own pixels, by job file, run or dataset."""

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
from pipeline.data.contact_sheet import BELOW, GAP, HEAD, LEFT, Settings, contact_sheet, png
from pipeline.data.decode import Image
from pipeline.data.device import DeviceAugment
from pipeline.data.loader import TrainLoader
from pipeline.errors import ConfigError, DataError
from pipeline.orchestrate.inspect_target import find
from tests.data.small_datasets import jpeg, make_dataset

SIDE = 128  # shown pixel by pixel
JOB = """
name: small
seed: 5
model: revcol_cifar
data: {root: images}
stages:
  prepare: {}
  pretrain: {image_size: 32, epochs: 4, global_batch: 16, base_lr: 1e-3, augment: {randaugment: 5}}
  finetune: {from: pretrain, image_size: 64, epochs: 2, global_batch: 16, base_lr: 1e-3, augment: {mixup: 0}}
"""


def cell(sheet: Image, row: int, column: int) -> Image:
    top, left = HEAD + row * (SIDE + BELOW + GAP), LEFT + column * (SIDE + GAP)
    return sheet[top : top + SIDE, left : left + SIDE]


def test_the_sheet_shows_what_the_loader_and_the_device_make(tmp_path: Path) -> None:
    data = make_dataset(tmp_path, {"train": 40}, size=(SIDE, 96))
    split, augment = data.split("train"), AugmentConfig()
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
    fed = device(
        images, torch.from_numpy(split.labels[samples.numpy()]), samples, torch.arange(6), 1
    )
    pixels = fed.image01.permute(0, 2, 3, 1).numpy() * 255
    for row, sample in enumerate(samples.tolist()):
        assert np.array_equal(cell(sheet, row, 1), images[row].numpy())
        assert not np.array_equal(cell(sheet, row, 2), images[row].numpy()), (
            "another epoch, another augmentation"
        )
        assert np.abs(cell(sheet, row, 3) - pixels[row]).max() <= 0.51
        stored = cell(sheet, row, 0)[16:112]
        assert (
            np.abs(stored.astype(int) - simplejpeg.decode_jpeg(jpeg(sample, SIDE, 96))).mean() < 3
        )
    names = sheet[HEAD:, : LEFT - GAP]
    assert all((names[row * (SIDE + BELOW + GAP) :][:SIDE] < 100).any() for row in range(6)), (
        "each row has a name"
    )


def test_the_sheet_is_a_function_of_its_arguments(tmp_path: Path) -> None:
    data = make_dataset(tmp_path, {"train": 12})
    settings = Settings(32, AugmentConfig(), 0)
    first = png(contact_sheet(data, settings, epoch=0, rows=3))
    assert png(contact_sheet(data, settings, epoch=0, rows=3)) == first
    assert png(contact_sheet(data, settings, epoch=1, rows=3)) != first
    with Pillow.open(io.BytesIO(first)) as opened:
        assert opened.format == "PNG"
    few = contact_sheet(make_dataset(tmp_path / "one", {"train": 1}, classes=2), settings, rows=8)
    assert few.shape[0] == HEAD + SIDE + BELOW + GAP


def test_long_and_foreign_names_and_small_and_large_images_fit(tmp_path: Path) -> None:
    data = make_dataset(tmp_path, {"train": 8}, classes=2, size=(400, 40))
    data.class_names = [
        "a name so long that no row could ever hold it, however narrow " * 3,
        "Zaunkönig 鷦鷯",
    ]
    for size in (32, 96, 224):
        sheet = contact_sheet(data, Settings(size, AugmentConfig(), 0), rows=2)
        assert (sheet[:, -GAP + 1 :] == sheet[-1, -1]).all(), "nothing runs over the edge"


def test_no_image_and_undecodable_images_are_said(tmp_path: Path) -> None:
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
        DataError, match=r"train-00000.parquet, row 0: the image is not what was written"
    ):
        contact_sheet(data, Settings(32, AugmentConfig(), 0))


def test_job_files_runs_and_datasets_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    run, runs = tmp_path / "runs" / "small", Path("runs")
    dataset = run / "stages" / "prepare" / "images"
    make_dataset(dataset, {"train": 20})
    for job in (tmp_path / "small.yaml", run / "run.yaml"):
        job.write_text(JOB)
    for what in ("small.yaml", "small", "runs/small", dataset):
        found = find(Path(what), runs)
        assert (found.dataset.absolute(), found.stage) == (dataset, "pretrain")
        assert (found.settings.image_size, found.settings.seed) == (32, 5)
        assert found.settings.augment.randaugment == 5
        assert find(Path(what), runs, "finetune").settings.augment.mixup == 0
    make_dataset(tmp_path / "alone", {"train": 3})
    assert find(Path("alone"), runs).settings == Settings(224, AugmentConfig(), 0)
    with pytest.raises(ConfigError, match="no job is known that has the stage 'pretrain'"):
        find(Path("alone"), runs, "pretrain")
    with pytest.raises(
        DataError,
        match=r"nothing: is no job file, run or prepared dataset\n  -> .*runs here: small",
    ):
        find(Path("nothing"), runs)


def test_the_command_writes_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / "set", {"train": 9})
    done = CliRunner().invoke(
        cli.app, ["data", "show", "set", "--out", "a/sheet.png", "--epoch", "3", "--rows", "2"]
    )
    assert done.exit_code == 0, done.output
    assert done.output.startswith("a/sheet.png: ")
    with Pillow.open(tmp_path / "a" / "sheet.png") as opened:
        opened.load()
    assert CliRunner().invoke(cli.app, ["data", "show", "set", "--epoch", "-1"]).exit_code == 2
