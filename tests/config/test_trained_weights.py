"""A job that evaluates a trained model takes the network from the model's own description."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import render
from pipeline.config.check import check
from pipeline.config.load import load_job
from pipeline.config.schema import EvaluateStage
from pipeline.errors import ConfigError
from tests.config.jobs import ROOT, edited, error_message, write

EVALUATE = ROOT / "jobs" / "evaluate.yaml"


def _evaluate(source: Path, images: Path) -> EvaluateStage:
    """The evaluate stage of the shipped job for a model, after the checks of the job."""
    loaded = load_job(EVALUATE, [f"stages.evaluate.from={source}", f"data.root={images}"])
    check(loaded.job, 2, loaded.origins)
    assert loaded.job.model.channels == (8, 16, 24, 32)
    assert loaded.job.model.block == "c2f"
    assert loaded.job.model.activations == "exact", "how training computed does not matter"
    assert loaded.origins["model.channels"].endswith("model.json")
    assert "images, 96 pixels" in render.dry_run(loaded, world_size=2)
    stage = loaded.job.stages.evaluate
    assert stage is not None
    return stage


def test_an_export_its_file_and_its_run_are_the_same_model(
    exported_model: Path, own_images: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "export").symlink_to(exported_model)
    for source in (exported_model, exported_model / "model.safetensors", tmp_path / "run"):
        stage = _evaluate(source, own_images)
        assert Path(stage.initial).samefile(exported_model / "model.safetensors")
        assert stage.image_size == 96


@pytest.mark.parametrize(
    ("source", "cause"),
    [("", "no trained model is given"), ("/nothing/here", "there is no trained model in")],
)
def test_without_a_trained_model_the_job_says_what_to_set(
    source: str, cause: str, own_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINED_MODEL", source)
    with pytest.raises(ConfigError, match=f"stages.evaluate.from: {cause}") as error:
        load_job(EVALUATE, [f"data.root={own_images}"])
    line = 1 + EVALUATE.read_text().splitlines().index('  evaluate: {from: "${TRAINED_MODEL:-}"}')
    assert error.value.place.endswith(f"evaluate.yaml:{line}")
    assert error.value.remedy.startswith("--set stages.evaluate.from=DIR")


def test_a_damaged_description_is_named(own_images: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model\.json: cannot be read"):
        load_job(EVALUATE, [f"stages.evaluate.from={tmp_path}", f"data.root={own_images}"])


def test_the_model_of_a_job_is_its_own(exported_model: Path, tmp_path: Path) -> None:
    text = edited("evaluate: {from: finetune}", f"evaluate: {{from: {exported_model}}}")
    job = load_job(write(tmp_path, text)).job
    assert job.model.channels != (8, 16, 24, 32)


def test_weights_of_another_network_name_the_keys_to_change(
    exported_model: Path, tmp_path: Path
) -> None:
    text = edited("evaluate: {from: finetune}", f"evaluate: {{from: {exported_model}}}")
    message = error_message(tmp_path, text)
    difference = "the job has [1, 1, 1, 1], the weights of stages.evaluate.from [1, 1, 2, 1]"
    assert f"model.depths: {difference}\n  -> model.depths: [1, 1, 2, 1]" in message
    assert "model.columns" not in message


@pytest.mark.usefixtures("environment")
def test_an_evaluation_cannot_be_rehearsed() -> None:
    with pytest.raises(ConfigError, match="nothing to rehearse"):
        load_job(EVALUATE, rehearse=True)
