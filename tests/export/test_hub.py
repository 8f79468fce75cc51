"""Real timm and transformers read the exported folder, and compute what the network computes."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.weights_reader import WeightsReader
from pipeline.config.trained_weights import weights_file
from pipeline.export.reload import Exported
from pipeline.export.weights_model import load_weights
from tests.export.hub_models import EXPECTED, exported, run_python, write_hub

TIMM = (
    EXPECTED
    + """
import modeling_revcol, timm
from timm.optim import param_groups_layer_decay
location = f"local-dir:{folder}"
create = lambda **options: timm.create_model(location, pretrained=True, **options).eval()
results = {"models": sorted(timm.list_models("revcol*"))}
model = create()
with torch.no_grad():
    results["logits"] = torch.equal(model(images), logits)
    pyramid = create(features_only=True)
    maps = pyramid(images)
    results["maps"] = all(torch.equal(m, expected[f"map{i}"]) for i, m in enumerate(maps))
    results["info"] = [pyramid.feature_info.channels(), pyramid.feature_info.reduction()]
    some = create(features_only=True, out_indices=(1, 3))(images)
    results["out_indices"] = [list(m.shape[1:]) for m in some]
    results["head"] = list(create(num_classes=5)(images).shape)
    features = create(num_classes=0)(images)
    results["features"] = list(features.shape)
    pre_logits = model.forward_head(model.forward_features(images), pre_logits=True)
    results["pre_logits"] = torch.equal(pre_logits, features)
    unpooled = create(num_classes=0, global_pool="")(images)
    results["unpooled"] = list(unpooled.shape)
    results["in_chans"] = list(create(in_chans=1)(images[:, :1]).shape)
    last, some = model.forward_intermediates(images, indices=2)
    results["intermediates"] = [torch.equal(last, expected["map3"]), len(some)]
    classifier = model.get_classifier()
    model.reset_classifier(7)
    results["reset"] = list(model(images).shape)
groups = param_groups_layer_decay(create(drop_path_rate=0.1), weight_decay=0.05, layer_decay=0.8)
names = {id(p): n for n, p in model.named_parameters()}
model = create(drop_path_rate=0.1)
names = {id(parameter): name for name, parameter in model.named_parameters()}
groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.8)
results["groups"] = {
    names[id(parameter)]: [round(group["lr_scale"], 9), group["weight_decay"]]
    for group in groups
    for parameter in group["params"]
}
timm.models.save_for_hf(create(), str(folder.parent / "saved"), safe_serialization=True)
print(json.dumps(results))
"""
)


@pytest.fixture(scope="module")
def timm_results(folder: Path) -> dict[str, object]:
    results: dict[str, object] = run_python(TIMM, folder)
    return results


def test_timm_computes_the_same_logits_and_maps(timm_results: dict[str, object]) -> None:
    assert timm_results["models"] == sorted(
        [
            "revcol",
            *(f"revcol_{size}" for size in ("tiny", "small", "base", "large", "xlarge", "huge")),
        ]
    )
    assert timm_results["logits"]
    assert timm_results["maps"]
    assert timm_results["info"] == [[8, 16, 24, 32], [4, 8, 16, 32]]


def test_timm_finds_its_whole_contract(timm_results: dict[str, object]) -> None:
    assert timm_results["out_indices"] == [[16, 8, 12], [32, 2, 3]]
    assert timm_results["head"] == [3, 5]
    assert timm_results["features"] == [3, 32]
    assert timm_results["pre_logits"]
    assert timm_results["unpooled"] == [3, 32, 2, 3]
    assert timm_results["in_chans"] == [3, 6]
    assert timm_results["intermediates"] == [True, 2]
    assert timm_results["reset"] == [3, 7]


def test_layer_decay_of_timm_groups_as_ours_does(
    timm_results: dict[str, object], model: Exported
) -> None:
    from pipeline.config.schema import TrainConfig
    from pipeline.train.optimizer import parameter_groups

    settings = {"epochs": 1, "base_lr": 1e-3, "layer_decay": 0.8, "weight_decay": 0.05}
    plain = exported(huge=True).network
    names = {id(parameter): name for name, parameter in plain.named_parameters()}
    ours = {
        names[id(parameter)]: [round(group["lr_scale"], 9), group["weight_decay"]]
        for group in parameter_groups(plain, TrainConfig.model_validate(settings))
        for parameter in group["params"]
    }
    assert timm_results["groups"] == ours


def test_folders_are_read_back(
    folder: Path, timm_results: dict[str, object], model: Exported
) -> None:
    del timm_results  # which has saved the second folder
    images = load_file(folder.parent / "expected.safetensors")["images"]
    with torch.no_grad():
        expected = model.network(images).logits[-1]
        for saved in (folder, folder.parent / "saved"):
            read = load_weights(weights_file(str(saved)))
            assert torch.equal(read.network(images).logits[-1], expected), saved
            assert read.network.spec.huge
    assert load_weights(weights_file(str(folder))).description["classes"][:2] == ["c0", "c1"]
    description = WeightsDescription.read(folder / "model.safetensors")
    assert description.preprocessing == "published"
    alpha = WeightsReader(folder / "model.safetensors").shapes["columns.1.levels.0.alpha"]
    assert alpha == [8]
    assert load_file(folder / "model.safetensors")["columns.1.levels.0.alpha"].shape == (1, 8, 1, 1)


class _Hub(http.server.SimpleHTTPRequestHandler):
    """Serves a folder as the Hugging Face hub serves the repository user/model."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        folder = Path(self.directory)
        marker = "/user/model/resolve/"
        if self.path.startswith("/api/models/user/model"):
            names = sorted(path.name for path in folder.iterdir())
            body = json.dumps(
                {"id": "user/model", "sha": "0" * 40, "siblings": [{"rfilename": n} for n in names]}
            ).encode()
        elif self.path.startswith(marker):
            file = folder / self.path.removeprefix(marker).partition("/")[2].partition("?")[0]
            if not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = file.read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(body)}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(folder: Path) -> Iterator[str]:
    """The address of a server that has the folder as user/model."""
    handler = functools.partial(_Hub, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


FROM_HUB = (
    EXPECTED
    + """
import modeling_revcol, timm
from transformers import AutoModelForImageClassification
model = timm.create_model("hf-hub:user/model", pretrained=True).eval()
other = AutoModelForImageClassification.from_pretrained("user/model", trust_remote_code=True)
with torch.no_grad():
    equal = [torch.equal(model(images), logits), torch.equal(other.eval()(images).logits, logits)]
print(json.dumps(equal))
"""
)


def test_an_uploaded_folder_is_read_from_the_hub(folder: Path, hub: str, tmp_path: Path) -> None:
    results = run_python(FROM_HUB, folder, offline=False, HF_ENDPOINT=hub, HF_HOME=str(tmp_path))
    assert results == [True, True]


def test_weights_in_several_files_are_read_by_transformers_and_by_us(
    model: Exported, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.export.hub.shards.SHARD_BYTES", 100_000)
    sharded = write_hub(tmp_path / "hub", model)
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert not (sharded / "model.safetensors").exists()
    expected = load_file(folder.parent / "expected.safetensors")
    with torch.no_grad():
        logits = load_weights(weights_file(str(sharded))).network(expected["images"]).logits[-1]
    assert torch.allclose(logits, expected["logits"], atol=1e-6)
    shutil.copy(folder.parent / "expected.safetensors", tmp_path)
    code = EXPECTED + REMOTE_LOGITS
    assert run_python(code, sharded, HF_HOME=str(tmp_path / "cache")) is True


REMOTE_LOGITS = """
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
print(json.dumps(torch.equal(model(images).logits, logits)))
"""


def test_weights_in_bf16_take_half_the_space(model: Exported, folder: Path, tmp_path: Path) -> None:
    from pipeline.export.hub.write import write_folder

    write_folder(model, tmp_path, torch.bfloat16)
    large = (folder / "model.safetensors").stat().st_size
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * large
    images: Tensor = load_file(folder.parent / "expected.safetensors")["images"]
    with torch.no_grad():
        expected = model.network(images).logits[-1]
        logits = load_weights(weights_file(str(tmp_path))).network(images).logits[-1]
    assert 0 < float((logits - expected).abs().max() / expected.abs().max()) < 0.05
