"""A published file as the model of evaluate, finetune, export and predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.checkpoint.weights_reader import WeightsReader
from pipeline.config.schema import Job
from pipeline.data.dataset import open_dataset
from pipeline.errors import CheckpointError, DataError
from pipeline.evaluate.network import labelled_for
from pipeline.export import official
from pipeline.export.reload import load_export
from pipeline.export.stage import export_stage
from pipeline.export.weights_model import load_weights
from pipeline.layout import RunDir
from pipeline.model import build
from pipeline.sources.class_lists import class_list
from tests.checkpoint.published_files import write_published
from tests.data.small_datasets import jpeg, rename_classes
from tests.train import processes, staging


def published_file(path: Path, classes: int = staging.CLASSES, **network: Any) -> Path:
    """A published file of an untrained network of the job's sizes."""
    torch.manual_seed(7)
    settings = {key: value for key, value in staging.MODEL.items() if key != "drop_path"}
    model = build(**settings | {"num_classes": classes} | network)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    state = {name: value.clone() for name, value in official.to_published(model).items()}
    return write_published(path, state, image_size=64)


def job_from(stage: str, source: Path, **settings: Any) -> Job:
    """The job whose ``stage`` starts from a file."""
    job = staging.job(**settings.pop("model", {}))
    config = getattr(job.stages, stage)
    values = config.model_dump(by_alias=True) | {"from": str(source)} | settings
    changed = type(config).model_validate(values)
    return job.model_copy(update={"stages": job.stages.model_copy(update={stage: changed})})


def run(run_dir: RunDir, job: Job) -> Any:
    """Evaluate; the metrics or the error."""
    (result,) = processes.run(run_dir.logs, 1, staging.evaluate, job, run_dir)
    return result


def test_the_accuracy_is_that_of_the_definition(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path, train=1)
    file = published_file(tmp_path / "revcol.pth", supervised=True)
    metrics = run(run_dir, job_from("evaluate", file))
    assert isinstance(metrics, dict), metrics
    model = load_weights(str(file))
    split = open_dataset(run_dir.dataset(staging.DATASET)).split("validation")
    right = 0
    for i in range(len(split)):
        image = tmp_path / "image.jpg"
        image.write_bytes(split.image(i))
        right += int(model.predict(image, best=1)[0][0]) == split.label(i)
    assert model.preprocessing().mode == "published"
    assert metrics["top1"] == pytest.approx(right / len(split))


@pytest.mark.parametrize(
    ("network", "cause"),
    [
        ({"classes": 9}, "the classifier has 9 outputs, set has 6 classes"),
        ({"columns": 5}, "parameter"),
    ],
)
def test_another_head_is_refused_with_both_numbers(
    network: dict[str, Any], cause: str, tmp_path: Path
) -> None:
    run_dir = staging.prepared_run(tmp_path, train=1)
    file = published_file(tmp_path / "revcol.pth", **network)
    error = run(
        run_dir, job_from("evaluate", file, model={"columns": 6} if "columns" in network else {})
    )
    assert isinstance(error, CheckpointError)
    assert cause in error.message
    assert error.remedy


def test_a_head_of_22k_classes_does_not_know_a_class_of_1k(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path, train=1)
    # One of the 1,000 is in neither list of 21 thousand.
    names = ["n04399382", *class_list("imagenet1k")[: staging.CLASSES - 1]]
    rename_classes(run_dir.dataset(staging.DATASET), names)
    data = open_dataset(run_dir.dataset(staging.DATASET))
    with pytest.raises(DataError, match="1 classes are unknown to the model: n04399382") as error:
        labelled_for(class_list("fall11_21841"), data, "validation")
    assert "fine-tune the weights on these classes" in error.value.remedy


def log_of_finetuning(run_dir: RunDir, file: Path) -> str:
    """Messages of a fine-tuning of one step without learning, from a file."""
    settings = {
        "max_steps": 1,
        "epochs": 1,
        "ema_decay": 0.0,
        "base_lr": 1e-30,
        "weight_decay": 0.0,
    }
    job = job_from("finetune", file, **settings, min_lr=0.0, warmup_epochs=0.0, warmup_lr=0.0)
    (result,) = staging.run_stage(run_dir, 1, job, "finetune")
    assert isinstance(result, dict), result
    return staging.messages(run_dir, "finetune")


def test_fine_tuning_takes_the_classifier_of_the_same_classes(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path)
    # A file does not name its classes, unless it has a head of ImageNet.
    file = published_file(tmp_path / "revcol.pth", supervised=True)
    assert "its classifier is not used" in log_of_finetuning(run_dir, file)
    weights = staging.weights(run_dir, "finetune")
    reader = WeightsReader(file)
    assert torch.allclose(weights["stem.conv.weight"], reader.full("stem.conv.weight"))
    head = "classifiers.0.linear.weight"
    assert not torch.allclose(weights[head], reader.full("classifiers.3.linear.weight"))


def test_an_export_of_the_same_classes_keeps_its_classifier(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path / "first")
    state = staging.with_weights(run_dir.path)
    export_stage(staging.job(), run_dir)
    other = staging.prepared_run(tmp_path / "second")
    log = log_of_finetuning(other, run_dir.export / "model.safetensors")
    assert "0 parameters of the heads are new" in log
    head: Tensor = staging.weights(other, "finetune")["classifiers.0.linear.weight"]
    assert torch.allclose(head, state["classifiers.0.linear.weight"])


def test_a_published_file_is_exported_and_predicts(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path, train=1)
    file = published_file(tmp_path / "revcol.pth", huge=True)
    export_stage(job_from("export", file, model={"huge": True}), run_dir)
    image = tmp_path / "cat.jpg"
    image.write_bytes(jpeg(3, 100, 90))
    of_file = load_weights(str(file)).predict(image, best=6)
    of_export = load_export(run_dir.export).predict(image, best=6)
    assert [score for _, _, score in of_file] == [score for _, _, score in of_export]
    assert load_export(run_dir.export).description["preprocessing"]["mode"] == "published"


def test_another_order_of_classes_is_refused_in_an_export(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path / "run", train=1)
    model = build("revcol_quickstart", num_classes=1000)
    state = {name: value.clone() for name, value in official.to_published(model).items()}
    file = write_published(tmp_path / "revcol.pth", state)
    with pytest.raises(CheckpointError, match="1000 classes that are not the 6 of set"):
        export_stage(job_from("export", file), run_dir)
