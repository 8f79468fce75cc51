"""The export is enough for a user: it predicts as evaluation does, without ray and deepspeed, and under published names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.config.schema import AugmentConfig
from pipeline.data.dataset import open_dataset
from pipeline.data.device import DeviceAugment
from pipeline.data.loader import EvalLoader
from pipeline.errors import CheckpointError, DataError
from pipeline.export.reload import load_export, make_network
from pipeline.export.stage import export_stage
from pipeline.layout import RunDir
from tests.data.small_datasets import jpeg
from tests.train import staging


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "huge_supervised"])
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = staging.prepared(tmp_path_factory.mktemp("run"))
    state = staging.with_weights(run_dir, supervised=request.param, huge=request.param)
    metrics = export_stage(staging.job(huge=request.param), RunDir(run_dir))
    assert metrics["reload_difference"] == 0 and metrics["parameters"] == sum(
        value.numel() for value in state.values()
    )
    return run_dir


def test_it_prepares_and_predicts_as_evaluation_does(run_dir: Path, tmp_path: Path) -> None:
    model, data = load_export(run_dir / "export"), open_dataset(run_dir / "stages/prepare/set")
    split = data.split("validation")
    normalise = DeviceAugment(AugmentConfig(), len(data.classes), 0, train=False)
    with EvalLoader(split, image_size=64, resize=1.143, batch=len(split)) as loader:
        batch = next(iter(loader))
        images = normalise(batch.images, batch.labels, batch.samples, batch.positions, 0).images
    for i in range(5):
        path = tmp_path / f"{i}.jpg"
        path.write_bytes(split.image(i))
        assert torch.equal(model.prepare(path)[0], images[i])
        with torch.no_grad():
            expected = model.network(images[i : i + 1]).logits[-1].softmax(1)[0]
        found = model.predict(str(path), best=3)
        assert [probability for _, _, probability in found] == pytest.approx(
            expected.topk(3).values.tolist()
        )
        best = int(expected.argmax())
        assert found[0][:2] == (f"c{best}", f"class {best}")
    assert len(model.predict(tmp_path / "0.jpg", best=99)) == staging.CLASSES


FRESH = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "deepspeed"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
import torch
from pipeline.export.reload import load_export, self_test
torch.set_num_threads(1)
assert self_test(__import__("pathlib").Path(sys.argv[1])) == 0
print(json.dumps(load_export(sys.argv[1]).predict(sys.argv[2])))
"""


def test_a_fresh_process_without_ray_and_deepspeed(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(jpeg(3, 100, 90))
    command = [sys.executable, "-c", FRESH, str(run_dir / "export"), str(tmp_path / "cat.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 5
    for (a, b, p), (c, d, q) in zip(
        found, load_export(run_dir / "export").predict(tmp_path / "cat.jpg"), strict=True
    ):
        assert (a, b) == (c, d) and p == pytest.approx(q)


def test_the_description_tells_all_and_the_published_file_loads(run_dir: Path) -> None:
    description = json.loads((run_dir / "export" / "model.json").read_text())
    how = description["preprocessing"]
    assert (how["image_size"], how["resize"], how["color"]) == (64, 1.143, "RGB") and len(
        how["mean"]
    ) == 3
    assert description["classes"] == [f"c{i}" for i in range(staging.CLASSES)] and description[
        "trained"
    ] == {"top1": 0.5}
    published = torch.load(run_dir / "export" / "revcol.pth", weights_only=True)["model"]
    assert published["subnet1.alpha0"].shape == (1, 8, 1, 1) and published[
        "stem.0.weight"
    ].shape == (8, 3, 4, 4)
    assert len(published) == len(make_network(description).state_dict())
    assert (run_dir / "export" / "revcol.pth").stat().st_size < 2 * (
        run_dir / "export" / "model.safetensors"
    ).stat().st_size


def test_what_cannot_be_read_is_explained(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not an exported model"):
        load_export(tmp_path)
    (tmp_path / "no.jpg").write_bytes(b"no image")
    for name in ("no.jpg", "missing.jpg"):
        with pytest.raises(DataError, match=name):
            load_export(run_dir / "export").predict(tmp_path / name)
