"""Evaluation: every validation image once, whatever the number of processes, during training and on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.augment import EvalTransform
from pipeline.data.dataset import open_dataset
from pipeline.data.device import MEAN, STD
from pipeline.errors import CheckpointError
from pipeline.evaluate.network import load_network
from pipeline.layout import RunDir
from tests.train import processes, staging


def evaluate(run_dir: Path, world: int, job: Any = None) -> Any:
    metrics, *others = processes.run(
        run_dir / "logs", world, staging.evaluate, job or staging.job(), run_dir
    )
    assert all(type(other) is type(metrics) for other in others)
    return metrics


def one_by_one(run_dir: Path) -> dict[str, float]:
    """The definition: one image after the other through the network."""
    data = open_dataset(run_dir / "stages" / "prepare" / "set")
    split, network = (
        data.split("validation"),
        load_network(staging.job(), RunDir(run_dir), "finetune", data),
    )
    transform, pixels = EvalTransform(64, 1.143), np.empty((64, 64, 3), dtype=np.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    first = among = loss = 0.0
    for i in range(len(split)):
        transform(split.image(i), pixels)
        with torch.no_grad():
            logits = network(
                (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - mean) / std
            ).logits[-1]
        order = logits[0].argsort(descending=True).tolist()
        first, among = first + (order[0] == split.label(i)), among + (split.label(i) in order[:5])
        loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor([split.label(i)])))
    return {
        "top1": first / len(split),
        "top5": among / len(split),
        "loss": loss / len(split),
        "images": len(split),
    }


@pytest.mark.parametrize("images", [23, 2])
def test_the_same_figures_on_any_number_of_processes(images: int, tmp_path: Path) -> None:
    run_dir = staging.prepared(tmp_path, train=1, validation=images)
    staging.with_weights(run_dir)
    expected = one_by_one(run_dir)
    assert expected["images"] == images and expected["top5"] > 0
    for world in (1, 2, 3):
        found = evaluate(run_dir, world)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert {**found, "loss": 0} == {**expected, "loss": 0}


@pytest.mark.parametrize("world", [2, 3])
def test_evaluation_while_training_under_zero_3(world: int, tmp_path: Path) -> None:
    run_dir = staging.prepared(tmp_path)
    job = staging.job(
        finetune={
            "from": "",
            "global_batch": 12,
            "zero_stage": 3,
            "max_steps": 1,
            "ema_decay": 0.5,
        },
        activations="stored",
    )
    during, *_ = processes.run(run_dir / "logs", world, staging.train, job, "finetune", run_dir)
    assert isinstance(during, dict), during
    after = evaluate(run_dir, 1, job)
    assert after["images"] == staging.VALIDATION
    assert {key: during[key] for key in ("top1", "top5")} == {
        key: after[key] for key in ("top1", "top5")
    }
    (event,) = staging.events(run_dir, "evaluation", "finetune")
    assert event.scalars["loss/validation"] == pytest.approx(after["loss"], rel=1e-5)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    run_dir = staging.prepared(tmp_path)
    with pytest.raises(CheckpointError, match="weights file is missing"):
        raise evaluate(run_dir, 1)
    staging.with_weights(run_dir, num_classes=9)
    with pytest.raises(CheckpointError, match=r"classifiers\.0\.linear\.weight"):
        raise evaluate(run_dir, 2)
    with pytest.raises(CheckpointError, match=r"parameter stem\.conv\.weight of the model"):
        raise evaluate(run_dir, 1, staging.job(channels=[16, 16, 24, 32]))


def test_a_weights_file_without_a_description_needs_an_image_size(tmp_path: Path) -> None:
    run_dir = staging.prepared(tmp_path)
    staging.with_weights(run_dir, supervised=True)
    expected = evaluate(run_dir, 1)
    file = (run_dir / "stages" / "finetune" / "weights.safetensors").rename(
        tmp_path / "other.safetensors"
    )
    job = staging.job()
    elsewhere: dict[str, Any] = {"batch": 5, "from": str(file)}
    for options in (elsewhere, elsewhere | {"image_size": 64}):
        stages = job.stages.model_copy(
            update={"evaluate": type(job.stages.evaluate).model_validate(options)}
        )
        found = evaluate(run_dir, 1, job.model_copy(update={"stages": stages}))
        if "image_size" in options:
            assert found == pytest.approx(expected)
        else:
            assert isinstance(found, CheckpointError) and "image size" in found.message
