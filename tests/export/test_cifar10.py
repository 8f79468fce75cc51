"""A trained network: other runtimes give the same classes on all test images of CIFAR-10."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from pipeline.config.schema import AugmentConfig
from pipeline.data.dataset import open_dataset
from pipeline.data.device import DeviceAugment
from pipeline.data.loader import EvalLoader
from pipeline.export.formats import write_formats
from pipeline.export.reload import load_export
from pipeline.files import digest, file_digest
from pipeline.layout import RunDir
from pipeline.model import Network
from tests.export.hub_models import ROOT

JOB = ROOT / "jobs" / "cifar10.yaml"
# What the network and its training depend on; another content is trained again.
INPUTS = (
    JOB,
    ROOT / "configs/model/revcol_cifar.yaml",
    ROOT / "configs/recipe/cifar_pretrain.yaml",
)
EPOCHS = 2
CACHE = Path.home() / ".cache" / "revcol-pipeline-tests"
IMAGES = 10_000


@pytest.fixture(scope="module")
def run_dir(shared: Path) -> RunDir:
    """A run of two epochs. It is kept, because it takes minutes."""
    content = "".join(file_digest(path) for path in INPUTS)
    folder = CACHE / f"cifar10-{digest(content.encode())[:16]}"
    run = RunDir(folder)
    if not run.evaluation.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        settings = [
            f"data.root={shared / 'data' / 'cifar10'}",
            f"stages.pretrain.epochs={EPOCHS}",
            "stages.pretrain.warmup_epochs=0.5",
        ]
        options = [option for setting in settings for option in ("--set", setting)]
        command = [sys.executable, "-m", "pipeline", "run", str(JOB), *options]
        subprocess.run([*command, "--run-dir", str(folder)], cwd=ROOT, check=True)
    return run


@pytest.fixture(scope="module")
def images(run_dir: RunDir) -> tuple[Tensor, Tensor]:
    """All test images as the network receives them, and their labels."""
    data = open_dataset(next(path for path in run_dir.stage("prepare").iterdir() if path.is_dir()))
    preprocessing = load_export(run_dir.export).preprocessing()
    normalise = DeviceAugment(AugmentConfig(), len(data.classes), 0, train=False)
    batches = []
    labels = []
    with EvalLoader(
        data.split(data.description.reported_split()),
        preprocessing=preprocessing,
        batch=500,
        threads=os.cpu_count() or 1,
    ) as loader:
        for batch in loader:
            given = batch.labels
            batches.append(normalise(batch.images, given, given, given, 0).images.clone())
            labels.append(given.clone())
    return torch.cat(batches), torch.cat(labels)


@torch.no_grad()
def classes_of(network: Network, images: Tensor) -> Tensor:
    return torch.cat([network(batch).logits[-1].argmax(1) for batch in images.split(500)])


@pytest.mark.shared
def test_onnx_runtime_classifies_every_image_alike(
    run_dir: RunDir, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    pixels, labels = images
    assert len(pixels) == IMAGES
    export = tmp_path / "export"
    shutil.copytree(run_dir.export, export)
    write_formats(export, ["onnx"], lambda text, level="info": None)
    expected = classes_of(load_export(export).network, pixels)
    session = onnxruntime.InferenceSession(export / "onnx" / "model.onnx")
    classes = np.concatenate(
        [session.run(None, {"images": batch.numpy()})[0].argmax(1) for batch in pixels.split(500)]
    )
    assert np.array_equal(classes, expected.numpy())
    top1 = float((expected == labels).double().mean())
    assert top1 > 0.4, "the network has learned"
    assert float((torch.from_numpy(classes) == labels).double().mean()) == top1


@pytest.mark.shared
def test_the_fixed_point_stream_changes_no_accuracy(
    run_dir: RunDir, images: tuple[Tensor, Tensor]
) -> None:
    pixels, labels = images
    plain = load_export(run_dir.export).network
    exact = Network(dataclasses.replace(plain.spec, activations="exact")).eval()
    exact.load_state_dict(plain.state_dict())
    accuracies = [
        float((classes_of(network, pixels) == labels).double().mean()) for network in (plain, exact)
    ]
    assert abs(accuracies[0] - accuracies[1]) <= 0.001, accuracies
