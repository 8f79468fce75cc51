"""Evaluation: every validation image once for any number of processes, alone and in training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.description import WeightsDescription
from pipeline.config.schema import Job
from pipeline.data.augment import EvalTransform
from pipeline.data.dataset import open_dataset
from pipeline.data.preprocessing import MEAN, STD
from pipeline.errors import CheckpointError, DataError
from pipeline.evaluate.metrics import metrics_of
from pipeline.evaluate.network import load_network
from pipeline.export.reload import load_export
from pipeline.export.stage import export_stage
from pipeline.layout import RunDir
from pipeline.monitor import tags
from tests.data.small_datasets import rename_classes
from tests.train import processes, staging

CLASSES = 12  # enough for top-5
prepared_run = partial(staging.prepared_run, classes=CLASSES)
with_weights = partial(staging.with_weights, num_classes=CLASSES)


def evaluate(run_dir: RunDir, world_size: int, job: Job | None = None) -> Any:
    """Run the evaluate stage; the metrics or the error of rank 0."""
    results = processes.run(
        run_dir.logs, world_size, staging.evaluate, job or staging.job(), run_dir
    )
    for result in results:
        assert type(result) is type(results[0]), results
    return results[0]


def accuracy_by_definition(run_dir: RunDir, name: str = "validation") -> dict[str, float]:
    """The expected metrics of a split: one image after the other through the network."""
    data = open_dataset(run_dir.dataset(staging.DATASET))
    split = data.split(name)
    network = load_network(staging.job(), run_dir, "finetune", data)
    transform = EvalTransform(64, 1.143)
    pixels = np.empty((64, 64, 3), dtype=np.uint8)
    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    top1 = 0
    top5 = 0
    loss = 0.0
    for i in range(len(split)):
        transform(split.image(i), pixels)
        images = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - mean) / std
        with torch.no_grad():
            logits = network(images).logits[-1]
        label = split.label(i)
        ranking = logits[0].argsort(descending=True).tolist()
        top1 += ranking[0] == label
        top5 += label in ranking[:5]
        loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor([label])))
    images_seen = len(split)
    return {
        "top1": top1 / images_seen,
        "top5": top5 / images_seen,
        "loss": loss / images_seen,
        f"{name}_images": images_seen,
    }


def test_loaded_weights_are_aligned_in_memory(tmp_path: Path) -> None:
    """Else the last bit of a result depends on where a file has them (an export is compared)."""
    run_dir = prepared_run(tmp_path, train=1, validation=9)
    with_weights(tmp_path)
    data = open_dataset(run_dir.dataset(staging.DATASET))
    network = load_network(staging.job(), run_dir, "finetune", data)
    assert {weight.data_ptr() % 64 for weight in network.parameters()} == {0}


def test_top_5_is_reported_above_ten_classes_only() -> None:
    assert list(metrics_of(10)) == ["top1", "loss"]
    assert list(metrics_of(11)) == ["top1", "top5", "loss"]


@pytest.mark.parametrize("images", [23, 2])
def test_metrics_are_the_same_for_any_number_of_processes(images: int, tmp_path: Path) -> None:
    run_dir = prepared_run(tmp_path, train=1, validation=images)
    with_weights(tmp_path)
    expected = accuracy_by_definition(run_dir)
    assert expected["validation_images"] == images
    assert expected["top5"] > 0 or images == 2  # of a random network
    for world_size in (1, 2, 3):
        metrics = evaluate(run_dir, world_size)
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert {**metrics, "loss": 0} == {**expected, "loss": 0}


def test_the_test_split_is_reported_by_name_and_the_export_quotes_it(tmp_path: Path) -> None:
    run_dir = prepared_run(tmp_path, train=1, validation=9, test=14)
    with_weights(tmp_path)
    metrics = evaluate(run_dir, 2)
    assert metrics == pytest.approx(accuracy_by_definition(run_dir, "test"), rel=1e-5)
    assert metrics["test_images"] == 14
    # TensorBoard and the event log.
    (event,) = staging.events(run_dir, "evaluation", "evaluate")
    assert event.scalars == {
        "accuracy/test_top1": metrics["top1"],
        "accuracy/test_top5": metrics["top5"],
        "loss/test": metrics["loss"],
    }
    assert list(run_dir.tensorboard("evaluate").iterdir())
    # The exported model.
    export_stage(staging.job(), run_dir)
    means = {name: metrics[name] for name in ("top1", "top5", "loss")}
    description = load_export(run_dir.export).description
    pixels = {"preprocessing": "fast", "image_size": 64}
    assert description["evaluated"] == {"split": "test", "images": 14, **pixels, **means}
    # Other weights were not evaluated.
    file = run_dir.weights("finetune")
    save_file({name: value * 2 for name, value in load_file(file).items()}, file)
    export_stage(staging.job(), run_dir)
    assert "evaluated" not in load_export(run_dir.export).description


@pytest.mark.parametrize("world_size", [2, 3])
def test_evaluation_during_training_under_zero_3_equals_the_stage(
    world_size: int, tmp_path: Path
) -> None:
    run_dir = prepared_run(tmp_path)
    settings = {
        "from": "",
        "global_batch": 12,
        "zero_stage": 3,
        "max_steps": 1,
        "ema_decay": 0.5,
    }
    job = staging.job(finetune=settings, activations="stored")
    during, *_ = staging.run_stage(run_dir, world_size, job, "finetune")
    assert isinstance(during, dict), during
    after = evaluate(run_dir, 1, job)
    assert after["validation_images"] == staging.VALIDATION
    assert during["top1"] == after["top1"]
    assert during["top5"] == after["top5"]
    (event,) = staging.events(run_dir, "evaluation", "finetune")
    assert event.scalars[tags.VALIDATION_LOSS] == pytest.approx(after["loss"], rel=1e-5)


def test_weights_that_do_not_fit_are_refused_by_parameter_name(tmp_path: Path) -> None:
    run_dir = prepared_run(tmp_path)
    with pytest.raises(CheckpointError, match="weights file is missing"):
        raise evaluate(run_dir, 1)
    staging.with_weights(tmp_path, num_classes=9)
    with pytest.raises(CheckpointError, match="the classifier has 9 outputs, set has 12 classes"):
        raise evaluate(run_dir, 2)
    other = prepared_run(tmp_path / "other")
    with_weights(other.path)
    with pytest.raises(CheckpointError, match=r"parameter stem\.conv\.weight of the model"):
        raise evaluate(other, 1, staging.job(channels=[16, 16, 24, 32]))


def test_a_weights_file_without_a_description_needs_an_image_size(tmp_path: Path) -> None:
    run_dir = prepared_run(tmp_path)
    with_weights(tmp_path, supervised=True)
    expected = evaluate(run_dir, 1)
    file = run_dir.weights("finetune").rename(tmp_path / "other.safetensors")

    def evaluate_file(**options: Any) -> Any:
        job = staging.job()
        stage = type(job.stages.evaluate).model_validate({"batch": 5, "from": str(file), **options})
        stages = job.stages.model_copy(update={"evaluate": stage})
        return evaluate(run_dir, 1, job.model_copy(update={"stages": stages}))

    error = evaluate_file()
    assert isinstance(error, CheckpointError)
    assert "image size" in error.message
    assert evaluate_file(image_size=64) == pytest.approx(expected)


def _relabelled(run_dir: RunDir, folder_classes: list[str], model_classes: list[str]) -> None:
    """Name the classes of the dataset, in its order, and those of the weights, in theirs."""
    rename_classes(run_dir.dataset(staging.DATASET), folder_classes)
    weights = run_dir.weights("finetune")
    description = WeightsDescription(image_size=64, preprocessing="fast", classes=model_classes)
    description.write(weights.parent)


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    run_dir = prepared_run(tmp_path, train=1)
    state = with_weights(tmp_path)
    model_classes = [f"c{label}" for label in range(CLASSES)]
    _relabelled(run_dir, model_classes, model_classes)
    expected = evaluate(run_dir, 1)
    # The same network with its outputs in another order, and one class more.
    order = [3, 0, 5, 1, 4, 2, *range(CLASSES - 1, 5, -1)]
    for name in ("classifiers.0.linear.weight", "classifiers.0.linear.bias"):
        far_below = torch.full_like(state[name][:1], 0.0 if "weight" in name else -1e9)
        state[name] = torch.cat([state[name][order], far_below])
    save_file(state, run_dir.weights("finetune"))
    _relabelled(run_dir, model_classes, [*(model_classes[k] for k in order), "other"])
    assert evaluate(run_dir, 2) == pytest.approx(expected, rel=1e-5)


def test_classes_that_the_model_does_not_know_are_named(tmp_path: Path) -> None:
    run_dir = prepared_run(tmp_path, train=1)
    with_weights(tmp_path)
    model_classes = [f"c{label}" for label in range(CLASSES)]
    renamed = [{"c1": "dog", "c4": "fox"}.get(name, name) for name in model_classes]
    _relabelled(run_dir, renamed, model_classes)
    with pytest.raises(DataError) as error:
        raise evaluate(run_dir, 1)
    assert "2 classes are unknown to the model: dog, fox" in error.value.message
    assert "the model knows 12 classes: c0, c1, c2, c3, c4, " in error.value.message
