"""The model card: valid for the Hugging Face hub, and its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from pipeline.export.hub.card import write_card
from pipeline.export.programs import write_onnx
from pipeline.export.reload import Exported
from pipeline.export.verification import Verification
from tests.data.small_datasets import jpeg
from tests.export.hub_models import exported, run_python, write_hub

CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def verification(name: str) -> Verification:
    return {
        "format": name,
        "libraries": {"torch": "2.13.0"},
        "images": 2,
        "largest_difference": 0.0,
        "relative_difference": 0.0,
        "same_argmax": 1.0,
        "load_seconds": 0.1,
        "images_per_s": 1234.5,
    }


@pytest.fixture(scope="module")
def evaluated() -> Exported:
    model = exported()
    model.description["name"] = "flowers"
    model.description["data"] = "meadow"
    model.description["job"] = "name: flowers\n"
    model.description["evaluated"] = {
        "split": "test",
        "images": 50,
        "preprocessing": "published",
        "image_size": 64,
        "top1": 0.7625,
        "top5": 0.93,
        "loss": 1.5,
    }
    return model


@pytest.fixture(scope="module")
def folder(evaluated: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with the formats whose use the card shows."""
    export = tmp_path_factory.mktemp("export")
    (export / "onnx").mkdir()
    write_onnx(evaluated, export / "onnx", ["model_uint8.onnx"])
    folder = write_hub(export / "hub", evaluated)
    write_card(folder, evaluated, [verification(name) for name in ("native", "onnx", "hub")])
    (folder / "IMAGE.jpg").write_bytes(jpeg(2, 90, 100))
    return folder


def test_the_hub_understands_the_card(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "timm"
    assert card.data.pipeline_tag == "image-classification"
    validate_repo_id(f"someone/{card.data.model_name}")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results or []}
    assert values == {"Top-1 accuracy": 0.7625, "Top-5 accuracy": 0.93}
    # The round trip through the library's own writer keeps the model-index.
    again = ModelCard(str(card)).data.to_dict()
    assert again["model-index"] == card.data.to_dict()["model-index"]


def test_the_card_says_how_the_accuracy_was_measured_and_the_model_made(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "top-1 76.25%, top-5 93.00% on 50 images of the split test" in text
    assert "prepared as 'published' at 64 pixels" in text
    assert "```yaml\nname: flowers\n```" in text
    assert "| onnx | torch 2.13.0 | 0.0e+00 | 100% | 1,234.5 |" in text
    assert "class 0, class 1" in text


def test_a_model_that_was_not_evaluated_has_no_accuracy(tmp_path: Path) -> None:
    write_card(tmp_path, exported(), [verification("hub")])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None
    assert "onnxruntime" not in card.text


def test_every_code_block_of_the_card_runs(folder: Path, tmp_path: Path) -> None:
    blocks = CODE.findall((folder / "README.md").read_text())
    assert len(blocks) == 4
    program = "import os\nos.chdir(folder)\nresults = {}\n"
    for block in blocks:
        program += f"values = {{}}\nexec({block!r}, values)\nresults |= values\n"
    program += "print(json.dumps([list(results['logits'].shape), results['label']]))\n"
    shape, label = run_python(program, folder, HF_HOME=str(tmp_path))
    assert shape == [1, 6]
    assert re.fullmatch(r"c[0-5]", label)


def test_an_export_of_an_earlier_version_gets_a_card(tmp_path: Path) -> None:
    model = exported()
    model.description["evaluated"] = {"split": "validation", "images": 50, "top1": 0.7625}
    folder = write_hub(tmp_path / "hub", model)
    write_card(folder, model, [verification("native")])
    text = (folder / "README.md").read_text()
    assert "top-1 76.25% on 50 images of the split validation. For this model" in text
