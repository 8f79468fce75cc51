"""Programs of an exported model: ONNX Runtime, OpenVINO and torch.export compute the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch

from pipeline.config.export_formats import FORMATS
from pipeline.errors import ConfigError
from pipeline.export import formats
from pipeline.export.programs import write_onnx, write_torch_export
from pipeline.export.reload import Exported, load_export
from pipeline.export.stage import export_stage
from pipeline.export.verification import verify
from pipeline.layout import RunDir
from pipeline.orchestrate.artifacts import outputs
from pipeline.orchestrate.run_state import StageRecord
from pipeline.orchestrate.summary import table
from tests.train import staging


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose export has every format."""
    path = tmp_path_factory.mktemp("run")
    run_dir = staging.prepared_run(path)
    staging.with_weights(path, supervised=True, huge=True)
    job = staging.job(huge=True)
    assert job.stages.export is not None
    stage = job.stages.export.model_copy(update={"formats": list(FORMATS)})
    stages = job.stages.model_copy(update={"export": stage})
    metrics = export_stage(job.model_copy(update={"stages": stages}), run_dir)
    assert not [name for name in metrics if name.endswith("_missing")]
    return run_dir


@pytest.fixture(scope="module")
def model(run_dir: RunDir) -> Exported:
    return load_export(run_dir.export)


def session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def largest_relative(value: object, expected: torch.Tensor) -> float:
    difference = torch.from_numpy(np.asarray(value)) - expected
    return float(difference.abs().max() / expected.abs().max())


@torch.no_grad()
def test_onnx_runtime_computes_the_same_logits_for_any_batch(
    run_dir: RunDir, model: Exported
) -> None:
    program = session(run_dir.export / "onnx" / "model.onnx")
    assert [entry.name for entry in program.get_inputs()] == ["images"]
    assert [entry.name for entry in program.get_outputs()] == ["logits"]
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))
        expected = model.network(images).logits[-1]
        (logits,) = program.run(None, {"images": images.numpy()})
        assert largest_relative(logits, expected) < 1e-5
        assert np.array_equal(logits.argmax(1), expected.argmax(1).numpy())


@torch.no_grad()
def test_the_pyramid_takes_images_of_any_size(run_dir: RunDir, model: Exported) -> None:
    program = session(run_dir.export / "onnx" / "features.onnx")
    names = ["stride4", "stride8", "stride16", "stride32"]
    assert [entry.name for entry in program.get_outputs()] == names
    for batch, height, width in ((1, 64, 64), (2, 96, 160), (3, 70, 107)):
        images = torch.randn(batch, 3, height, width)
        maps = program.run(None, {"images": images.numpy()})
        for value, level in zip(maps, model.network.features(images)[-4:], strict=True):
            assert largest_relative(value, level.permute(0, 3, 1, 2)) < 1e-5


@torch.no_grad()
def test_pixels_are_normalised_inside_the_program(run_dir: RunDir, model: Exported) -> None:
    program = session(run_dir.export / "onnx" / "model_uint8.onnx")
    pixels = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    settings = model.description["preprocessing"]
    std = torch.tensor(settings["std"])
    mean = torch.tensor(settings["mean"])
    images = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    expected = model.network(images).logits[-1]
    (logits,) = program.run(None, {"pixels": pixels.numpy()})
    assert largest_relative(logits, expected) < 1e-5


@pytest.mark.parametrize("name", ["model.onnx", "model_uint8.onnx", "features.onnx"])
def test_a_program_passes_the_full_check_and_describes_itself(name: str, run_dir: RunDir) -> None:
    path = run_dir.export / "onnx" / name
    onnx.checker.check_model(path, full_check=True)
    program = onnx.load(path)
    assert max(entry.version for entry in program.opset_import if not entry.domain) >= 18
    metadata = {
        entry.key: json.loads(entry.value)
        for entry in program.metadata_props
        if entry.key in ("classes", "preprocessing")
    }
    assert metadata["classes"] == [f"c{label}" for label in range(staging.CLASSES)]
    assert metadata["preprocessing"]["image_size"] == 64


@torch.no_grad()
def test_openvino_reads_the_same_file(run_dir: RunDir, model: Exported) -> None:
    path = run_dir.export / "onnx" / "model.onnx"
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = torch.randn(3, 3, 64, 64)
    expected = model.network(images).logits[-1]
    logits = compiled(images.numpy())[0]
    assert largest_relative(logits, expected) < 1e-5
    assert np.array_equal(logits.argmax(1), expected.argmax(1).numpy())


# Of all packages, torch alone (and what it imports itself).
ONLY_TORCH = """
import sys
for name in ("pipeline", "timm", "transformers", "onnx", "safetensors"):
    sys.modules[name] = None  # as if it was not installed
import torch
torch.set_num_threads(1)
program = torch.export.load(sys.argv[1]).module()
values = torch.load(sys.argv[2])
assert all(torch.equal(program(images), logits) for images, logits in values)
"""


@torch.no_grad()
def test_a_process_that_has_only_torch_runs_the_program(
    run_dir: RunDir, model: Exported, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batches = [torch.randn(batch, 3, 64, 64) for batch in (1, 2, 5)]
    torch.save(
        [(images, model.network(images).logits[-1]) for images in batches], tmp_path / "v.pt"
    )
    torch.set_num_threads(threads)
    program = run_dir.export / "torch_export" / "model.pt2"
    subprocess.run([sys.executable, "-c", ONLY_TORCH, program, tmp_path / "v.pt"], check=True)


@pytest.mark.parametrize("name", ["native", "torch_export", "onnx"])
def test_a_verification_can_be_repeated(name: str, run_dir: RunDir) -> None:
    folder = run_dir.export / ("" if name == "native" else name)
    recorded = json.loads((folder / "verification.json").read_text())
    again = verify(name, folder, run_dir.export)
    # Times differ from call to call.
    stable = {"format", "libraries", "images", "largest_difference", "same_argmax"}
    assert {key: recorded[key] for key in stable} == {key: again[key] for key in stable}
    assert recorded["same_argmax"] == 1.0
    assert recorded["images_per_s"] > 0
    assert recorded["largest_difference"] == 0 or name == "onnx"


def test_every_file_of_a_format_is_an_output_of_the_stage(run_dir: RunDir) -> None:
    recorded = outputs(staging.job(huge=True), "export", run_dir)
    names = {str(Path(path).relative_to("export")) for path in recorded}
    assert {"verification.json", "onnx/model.onnx", "onnx/verification.json"} <= names
    assert {"torch_export/model.pt2", "hub/config.json", "hub/README.md"} <= names


def test_weights_that_a_program_cannot_hold_lie_beside_it(
    model: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.export.programs.EXTERNAL_BYTES", 1000)
    write_onnx(model, tmp_path, ["model.onnx"])
    assert (tmp_path / "model.onnx.data").stat().st_size > 1000
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.network(images).logits[-1]
    (logits,) = session(tmp_path / "model.onnx").run(None, {"images": images.numpy()})
    assert largest_relative(logits, expected) < 1e-5


def test_a_format_that_computes_something_else_is_removed(
    run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "export"
    shutil.copytree(run_dir.export, copy, ignore=shutil.ignore_patterns("hub", "onnx", "torch_*"))
    wrong = load_export(copy)

    def write_wrong(model: Exported, folder: Path) -> None:
        with torch.no_grad():
            wrong.network.classifiers[-1].linear.bias.add_(1.0)  # type: ignore[union-attr, operator]
        write_torch_export(wrong, folder)

    monkeypatch.setattr(formats, "write_torch_export", write_wrong)
    with pytest.raises(formats.StageError, match="computes other logits"):
        formats.write_formats(copy, ["torch_export"], lambda text, level="info": None)
    assert not (copy / "torch_export").exists()
    assert not [path for path in copy.iterdir() if path.name.startswith(".")]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pipeline.config.export_formats.find_spec", lambda name: None if name == "onnx" else name
    )
    with pytest.raises(ConfigError, match="onnx needs onnx") as error:
        formats.require_packages(["hub", "onnx"])
    assert error.value.exit_code == 2
    assert error.value.remedy == "pip install 'revcol-pipeline[onnx]'"
    with pytest.raises(ConfigError, match="there is no format 'tflite'"):
        formats.require_packages(["tflite"])
    record = StageRecord(state="done", metrics={"parameters": 3.0, "onnx_missing": 1.0})
    cells = [str(cell) for column in table({"export": record}).columns for cell in column.cells]
    assert any("onnx not written: pip install 'revcol-pipeline[onnx]'" in cell for cell in cells)
