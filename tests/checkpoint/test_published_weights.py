"""Published weights: read without executing anything, recognised, and exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.checkpoint.architecture import architecture_of
from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.weights_reader import WeightsReader
from pipeline.checkpoint.weights_source import weights_source
from pipeline.config.shipped_models import model_named
from pipeline.data.preprocessing import MEAN, STD
from pipeline.errors import CheckpointError, DataError
from pipeline.export import official
from pipeline.export.weights_model import load_weights
from pipeline.export.weights_summary import weights_summary
from pipeline.model import build
from tests.checkpoint.published_files import WritesAFile, write_published
from tests.golden.test_parity import DATA, FILES, SIZES, golden_path, load_golden, relative


def published(path: Path) -> dict[str, Tensor]:
    """The parameters of a golden file, under their published names."""
    with safe_open(path, "pt") as file:
        return {
            name.removeprefix("param."): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
            if name.startswith("param.")
        }


@pytest.fixture
def state() -> dict[str, Tensor]:
    return published(DATA / f"{FILES[0]}.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_gives_the_golden_logits(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    golden = golden_path(name, request)
    weights = published(golden)
    others = {name: torch.zeros_like(value) for name, value in weights.items()}
    path = write_published(tmp_path / "revcol.pth", others, ema=weights)
    model = load_weights(str(path)).network.double()
    reference, values = load_golden(golden, "stored")
    assert model.spec.architecture == reference.spec.architecture
    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    images = ((values["input_uint8"].float() / 255 - mean) / std).double()
    output = model(images)
    for i, logits in enumerate(output.logits):
        assert relative(logits, values[f"logits.{i}"]) < 1e-9
    for i, reconstruction in enumerate(output.reconstructions):
        assert relative(reconstruction, values[f"reconstruction.{i}"]) < 1e-9


@pytest.mark.parametrize("with_system", [True, False])
def test_nothing_in_a_file_is_executed(
    with_system: bool, state: dict[str, Tensor], tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    trap = WritesAFile(victim, with_system=with_system)
    path = write_published(tmp_path / "revcol.pth", state, extra=trap)
    if with_system:
        with pytest.raises(CheckpointError, match=r"it would call posix\.system"):
            WeightsReader(path)
    else:
        assert "builtins.exec" in WeightsReader(path).stand_ins
    assert not victim.exists()
    torch.save(trap, tmp_path / "trap.pth")
    torch.load(tmp_path / "trap.pth", weights_only=False)
    assert victim.exists(), "the trap works where a file is trusted"


def test_the_entry_that_a_user_names_is_read(state: dict[str, Tensor], tmp_path: Path) -> None:
    ema = {name: value + 1 for name, value in state.items()}
    path = write_published(tmp_path / "revcol.pth", state, ema=ema)
    chosen = WeightsReader(*weights_source(f"{path}#model")).full("stem.conv.bias")
    assert torch.equal(chosen, state["stem.0.bias"])
    assert torch.equal(WeightsReader(path).full("stem.conv.bias"), ema["stem.0.bias"])
    with pytest.raises(CheckpointError, match="no weights under 'teacher'") as error:
        WeightsReader(*weights_source(f"{path}#teacher"))
    assert f"{path}#model" in error.value.remedy


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_removed(
    prefix: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "wrapped.safetensors"
    save_file({f"{prefix}{name}": value for name, value in state.items()}, path)
    reader = WeightsReader(path)
    assert reader.prefix == prefix
    assert reader.published
    assert torch.equal(reader.full("stem.conv.bias"), state["stem.0.bias"])
    labels = dict(weights_summary(str(path)))
    assert prefix in labels["names"]


def test_a_state_dict_without_an_entry_is_read(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "bare.pth")
    assert WeightsReader(tmp_path / "bare.pth").published


def test_files_that_hold_no_weights_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    whole = write_published(tmp_path / "whole.pth", state).read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("<html>404</html>")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    causes = {
        "half": "failed finding central directory",
        "text": "Expected input",
        "empty": "no weights",
    }
    for name, cause in causes.items():
        with pytest.raises(CheckpointError, match=cause) as error:
            WeightsReader(tmp_path / f"{name}.pth")
        assert error.value.place.endswith(f"{name}.pth")
        assert error.value.remedy
        assert "weights_only" not in error.value.message, "no advice to execute the file"


def test_weights_of_another_network_are_named_as_such(tmp_path: Path) -> None:
    torch.save({"model": {"layer.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="another network"):
        dict(weights_summary(str(tmp_path / "other.pth")))
    with pytest.raises(DataError, match="is no weights file"):
        dict(weights_summary(str(tmp_path)))


@pytest.mark.parametrize("size", SIZES)
def test_all_published_sizes_are_recognised(size: str) -> None:
    table = json.loads((DATA / "official_parameters.json").read_text())
    cases = {key: case for key, case in table.items() if key.startswith(f"revcol_{size}/")}
    for key, case in cases.items():
        shapes = {name: tuple(shape) for name, shape in case["tensors"].items()}
        architecture = architecture_of(_ours(shapes))
        assert architecture is not None
        assert model_named(dict(architecture)) == f"revcol_{size}"
        assert architecture["num_classes"] == int(key.split("classes=")[1].split("/")[0])
        assert architecture["supervised"] is key.endswith("true")


def _ours(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    from pipeline.checkpoint.published_names import our_names, our_shape

    return {ours: our_shape(name, shapes[name]) for name, ours in our_names(shapes).items()}


@pytest.mark.parametrize("supervised", [False, True])
@pytest.mark.parametrize("classes", [5, 1001])
def test_names_and_shapes_are_converted_both_ways(supervised: bool, classes: int) -> None:
    with torch.device("meta"):
        model = build([4] * 4, [1, 2, 1, 1], 4, classes, huge=True, supervised=supervised)
    state = official.to_published(model)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    expected = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert _ours(shapes) == expected


def test_what_is_known_of_published_weights(tmp_path: Path) -> None:
    model = build([4] * 4, [1] * 4, 4, 1000)
    path = write_published(tmp_path / "r.pth", official.to_published(model), image_size=384)
    description = WeightsDescription.read(path)
    assert description.image_size == 384
    assert description.preprocessing == "published"
    assert description.classes is not None
    assert description.classes[0] == "n01440764"
    labels = dict(weights_summary(str(path)))
    assert labels["model"] == "none of configs/model"
    assert labels["classes"] == "1,000, in the order of configs/classes/imagenet1k.txt"
    assert labels["image size"] == "384 pixels"
    assert "yacs.config.CfgNode" in labels["not executed"]
