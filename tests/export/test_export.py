"""The export is enough for a user: it predicts as evaluation does, with few packages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.schema import AugmentConfig
from pipeline.data.dataset import open_dataset
from pipeline.data.device import DeviceAugment
from pipeline.data.loader import EvalLoader
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import CheckpointError, DataError
from pipeline.export.reload import load_export, make_network
from pipeline.export.stage import export_stage
from pipeline.layout import RunDir
from pipeline.orchestrate.artifacts import outputs
from tests.data.small_datasets import jpeg
from tests.train import staging

# What an exported model needs (docstring of ``pipeline.export.reload``), and what torch itself
# uses if it is installed.
NEEDED = {"torch", "safetensors", "numpy", "cv2", "PIL", "simplejpeg", "xxhash"}
USED_BY_TORCH = {"torchgen", "typing_extensions", "sympy", "mpmath", "tqdm", "dill", "packaging"}


def export(path: Path, **model: Any) -> RunDir:
    """Export an untrained network; checks the metrics of the stage."""
    run_dir = staging.prepared_run(path)
    state = staging.with_weights(path, **model)
    settings = {name: value for name, value in model.items() if name != "supervised"}
    metrics = export_stage(staging.job(**settings), run_dir)
    assert metrics["reload_difference"] == 0
    parameters = [value for name, value in state.items() if "running_" not in name]
    assert metrics["parameters"] == sum(value.numel() for value in parameters)
    return run_dir


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "huge_supervised"])
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    path = tmp_path_factory.mktemp("run")
    return export(path, supervised=request.param, huge=request.param)


def test_an_export_prepares_and_predicts_as_evaluation_does(
    run_dir: RunDir, tmp_path: Path
) -> None:
    model = load_export(run_dir.export)
    data = open_dataset(run_dir.dataset(staging.DATASET))
    split = data.split("validation")
    normalise = DeviceAugment(AugmentConfig(), len(data.classes), 0, train=False)
    with EvalLoader(split, preprocessing=Preprocessing(64), batch=len(split)) as loader:
        batch = next(iter(loader))
        images = normalise(batch.images, batch.labels, batch.samples, batch.positions, 0).images
    for i in range(5):
        path = tmp_path / f"{i}.jpg"
        path.write_bytes(split.image(i))
        assert torch.equal(model.prepare(path)[0], images[i])
        with torch.no_grad():
            expected = model.network(images[i : i + 1]).logits[-1].softmax(1)[0]
        predictions = model.predict(str(path), best=3)
        probabilities = [probability for _, _, probability in predictions]
        assert probabilities == pytest.approx(expected.topk(3).values.tolist())
        best = int(expected.argmax())
        assert predictions[0][:2] == (f"c{best}", f"class {best}")
    assert len(model.predict(tmp_path / "0.jpg", best=99)) == staging.CLASSES


# Blocks every package outside the standard library that is not in ALLOWED.
PREDICT_WITH_FEW_PACKAGES = """
import json, sys
ALLOWED = set(json.loads(sys.argv[3])) | {"pipeline"} | set(sys.stdlib_module_names)
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocker())
from pathlib import Path
from pipeline.export.reload import load_export, self_test
assert self_test(Path(sys.argv[1])) == 0
predictions = load_export(sys.argv[1]).predict(sys.argv[2])
ours = [name for name, module in sys.modules.items() if module is not None]
print(json.dumps({"predictions": predictions, "modules": ours}))
"""


def test_an_export_needs_only_the_packages_that_it_documents(
    run_dir: RunDir, tmp_path: Path
) -> None:
    image = tmp_path / "cat.jpg"
    image.write_bytes(jpeg(3, 100, 90))
    allowed = json.dumps(sorted(NEEDED | USED_BY_TORCH))
    arguments = [str(run_dir.export), str(image), allowed]
    command = [sys.executable, "-c", PREDICT_WITH_FEW_PACKAGES, *arguments]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    output = json.loads(completed.stdout)
    imported = {name.partition(".")[0] for name in output["modules"]}
    assert imported >= NEEDED
    blocked = {"ray", "deepspeed", "pydantic", "datasets", "tensorboard", "pyarrow", "typer"}
    assert not imported & (blocked | {"rich", "fsspec", "yaml", "psutil"})
    expected = load_export(run_dir.export).predict(image)
    assert len(expected) == 5
    for (class_id, name, probability), other in zip(output["predictions"], expected, strict=True):
        assert (class_id, name) == other[:2]
        assert probability == pytest.approx(other[2])


def test_the_description_is_complete_and_the_published_file_loads(run_dir: RunDir) -> None:
    description = json.loads((run_dir.export / "model.json").read_text())
    preprocessing = description["preprocessing"]
    assert preprocessing["image_size"] == 64
    assert preprocessing["mode"] == "fast"
    assert preprocessing["color"] == "RGB"
    assert len(preprocessing["mean"]) == 3
    assert description["classes"] == [f"c{i}" for i in range(staging.CLASSES)]
    assert description["trained"] == {"top1": 0.5}
    assert description["published_names"] == "revcol.pth"
    file = run_dir.export / "revcol.pth"
    published = torch.load(file, weights_only=True)["model"]
    assert published["subnet1.alpha0"].shape == (1, 8, 1, 1)
    assert published["stem.0.weight"].shape == (8, 3, 4, 4)
    assert len(published) == len(make_network(description).state_dict())
    assert file.stat().st_size < 2 * (run_dir.export / "model.safetensors").stat().st_size


def test_a_network_without_published_names_is_exported_without_the_published_file(
    tmp_path: Path,
) -> None:
    run_dir = export(tmp_path, block="c2f")
    assert not (run_dir.export / "revcol.pth").exists()
    model = load_export(run_dir.export)
    assert model.network.spec.block == "c2f"
    reason = "no file: the published code has no C2f blocks"
    assert model.description["published_names"] == reason


def test_an_export_replaces_the_published_file_of_another_network(
    run_dir: RunDir, tmp_path: Path
) -> None:
    shutil.copytree(run_dir.export, RunDir(tmp_path).export)
    note = RunDir(tmp_path).export / "notes.txt"
    note.touch()
    mixed = ["convnext", "c2f", "transformer", "c2f"]
    export(tmp_path, block=mixed)
    model = load_export(RunDir(tmp_path).export)
    reason = "no file: the published code has no C2f and no transformer blocks"
    assert model.description["published_names"] == reason
    recorded = outputs(staging.job(block=mixed), "export", RunDir(tmp_path))
    names = {Path(path).name for path in recorded}
    files = {"model.safetensors", "model.json", "selftest.safetensors", "verification.json"}
    assert names == files
    assert note.exists()  # a user's own file stays, and is no output of the stage


def test_unreadable_files_raise_errors_with_their_path(run_dir: RunDir, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not an exported model"):
        load_export(tmp_path)
    (tmp_path / "no.jpg").write_bytes(b"no image")
    for name in ("no.jpg", "missing.jpg"):
        with pytest.raises(DataError, match=name):
            load_export(run_dir.export).predict(tmp_path / name)
