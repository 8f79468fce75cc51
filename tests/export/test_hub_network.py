"""The network of the hub folder: one file that computes what ``pipeline.model`` computes."""

from __future__ import annotations

import ast
import sys
from typing import Any

import pytest
import torch

from pipeline.checkpoint.architecture import architecture_of
from pipeline.checkpoint.published_names import our_shape
from pipeline.export.hub.bundle import bundle
from pipeline.export.hub.network import RevColNet
from pipeline.export.programs import plain_network
from pipeline.model import RevCol
from pipeline.model.param_groups import layer_id
from tests.export.hub_models import exported

WIRINGS: list[dict[str, Any]] = [
    {"huge": True, "supervised": True},
    {"huge": True, "columns": 5, "supervised": True},
    {"block": "residual", "stem_stride": 2},
    {"block": "residual"},
    {"block": "c2f"},
    {"block": "transformer", "stem_stride": 1},
    {"block": ("convnext", "c2f", "transformer", "residual")},
]
each_wiring = pytest.mark.parametrize("wiring", WIRINGS, ids=str)


@each_wiring
@pytest.mark.parametrize("size", [(64, 96), (70, 107)])
def test_logits_and_maps_are_those_of_the_exported_network(
    wiring: dict[str, Any], size: tuple[int, int]
) -> None:
    model = exported(**wiring)
    plain = plain_network(model)
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        assert torch.equal(plain(images), model.network(images).logits[-1])
        # The maps of the column that the last classifier reads: with 5 columns, the one before.
        maps = model.network.features(images)
        if wiring.get("columns") != 5:
            for ours, theirs in zip(maps, plain.features(images), strict=True):
                assert torch.equal(ours, theirs)


@each_wiring
def test_gradients_of_a_step_are_those_of_stored_activations(wiring: dict[str, Any]) -> None:
    model = exported(**wiring | {"supervised": False})
    plain = plain_network(model).train()
    network = model.network.train()
    images = torch.randn(4, 3, 64, 64)
    labels = torch.tensor([1, 0, 5, 2])
    loss = torch.nn.functional.cross_entropy
    loss(network(images).logits[-1], labels).backward()
    loss(plain(images), labels).backward()
    # Sums may be taken in another order, and some gradients are sums of large terms that cancel.
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    largest = max(float(gradient.norm()) for gradient in gradients.values() if gradient is not None)
    for name, parameter in network.named_parameters():
        gradient = gradients[name]
        assert parameter.grad is not None
        assert gradient is not None, name
        difference = float((gradient.view_as(parameter.grad) - parameter.grad).norm())
        assert difference <= 1e-5 * largest, name


def test_recomputed_columns_give_the_same_gradients() -> None:
    plain = plain_network(exported()).train()
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for enabled in (False, True):
        plain.set_grad_checkpointing(enabled)
        plain.zero_grad()
        plain(images).sum().backward()
        gradients.append([parameter.grad for parameter in plain.parameters()])
    for stored, recomputed in zip(*gradients, strict=True):
        assert torch.equal(stored, recomputed)


def test_depths_are_those_of_the_published_layer_decay() -> None:
    model = exported(huge=True)
    matcher = plain_network(model).group_matcher()
    assert callable(matcher)
    for name, _ in model.network.named_parameters():
        assert matcher(name) == layer_id(name, model.network.spec), name


def test_stochastic_depth_skips_samples_in_training_only() -> None:
    net = RevColNet([8] * 4, [2] * 4, 2, num_classes=3, drop_path_rate=0.9)
    for name, parameter in net.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.ones_(parameter)
    images = torch.randn(1, 3, 64, 64).expand(8, 3, 64, 64)
    assert not torch.allclose(net.train()(images)[0], net(images)[1])
    with torch.no_grad():
        logits = net.eval()(images)
    assert torch.allclose(logits[0], logits[1], atol=1e-6)


def test_a_pyramid_is_that_of_the_detection_backbone() -> None:
    backbone = RevCol("ConvNeXt", [8, 16, 24, 32], [1, 2, 1, 1], 3, save_memory=False).eval()
    plain = RevColNet([8, 16, 24, 32], [1, 2, 1, 1], 3, num_classes=0).eval()
    state = plain.state_dict()
    ours = {name: value.view(state[name].shape) for name, value in backbone.state_dict().items()}
    plain.load_state_dict(state | ours)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        _, maps = plain.forward_intermediates(images)
        assert all(torch.equal(a, b) for a, b in zip(maps, backbone(images), strict=True))


def test_the_file_imports_nothing_of_this_project(tmp_path: Any) -> None:
    text = bundle()
    for node in ast.walk(ast.parse(text)):
        module = node.module if isinstance(node, ast.ImportFrom) else ""
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [module]
        for name in filter(None, names):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names | {"torch", "timm", "transformers"}, name
    assert "pipeline" not in text
    assert text.splitlines()[0].startswith('"""RevCol')


def test_the_weights_of_the_file_are_recognised() -> None:
    plain = plain_network(exported(huge=True))
    shapes = {name: tuple(value.shape) for name, value in plain.state_dict().items()}
    architecture = architecture_of({name: our_shape(name, shape) for name, shape in shapes.items()})
    assert architecture is not None
    assert architecture["channels"] == [8, 16, 24, 32]
    assert architecture["huge"]
