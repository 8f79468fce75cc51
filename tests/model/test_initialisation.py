"""Initial weights, layer scale, and the stem's stride: published values unless a spec says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.blocks import registry
from pipeline.blocks.kind import LAYER_SCALE
from pipeline.model import Network, build
from tests.model.networks import KINDS, MIXED, backward

WIDE = [64, 96, 128, 160]


def network(**options: Any) -> Network:
    torch.manual_seed(0)
    return build(WIDE, [1, 1, 1, 1], **({"columns": 4, "num_classes": 50} | options))


def layer_scales(model: Network) -> dict[str, torch.Tensor]:
    return {
        name: value
        for name, value in model.named_parameters()
        if name.rpartition(".")[2].startswith(LAYER_SCALE)
    }


@pytest.mark.parametrize("block", KINDS)
def test_fan_in_weights_keep_the_variance_whatever_the_width(block: str) -> None:
    model = network(block=block, init="fan_in", supervised=True)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        fan_in = layer.weight[0].numel()
        # 6 standard errors of a standard deviation of n samples, which is about 1 / sqrt(2n).
        tolerance = 6 / (2 * layer.weight.numel()) ** 0.5
        assert layer.weight.std().item() * fan_in**0.5 == pytest.approx(1, abs=tolerance)
        assert layer.bias is None or not layer.bias.any()


def test_fan_in_weights_of_the_head_are_scaled_by_the_head_scale() -> None:
    full = network(init="fan_in").classifiers[0].linear.weight
    silent = network(init="fan_in", head_init_scale=0.001).classifiers[0].linear.weight
    assert torch.allclose(silent, 0.001 * full)


@pytest.mark.parametrize("block", KINDS)
def test_the_layer_scale_starts_from_the_given_value(block: str) -> None:
    scales = layer_scales(network(block=block, layer_scale=0.5, supervised=True))
    assert scales
    for name, value in scales.items():
        assert bool((value == 0.5).all()), name
    in_blocks = [name for name in scales if ".blocks." in name]
    # BatchNorm has a scale of its own; a branch without it needs a layer scale.
    assert bool(in_blocks) is not registry.facts()[block].running_statistics


@pytest.mark.parametrize("block", KINDS)
def test_published_initial_weights_are_drawn_unless_a_spec_says_otherwise(block: str) -> None:
    model = network(block=block)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)
    for name, value in layer_scales(model).items():
        assert torch.equal(value, torch.full_like(value, 1e-6)), name


@pytest.mark.parametrize("stem_stride", [1, 2, 4])
@pytest.mark.parametrize("num_classes", [50, 1001])  # 1001: the simple decoder
def test_every_level_and_reconstruction_follows_the_stem(
    stem_stride: int, num_classes: int
) -> None:
    options: dict[str, Any] = {"columns": 4, "supervised": True, "stem_stride": stem_stride}
    model = build([8, 12, 16, 20], [1, 1, 1, 1], num_classes=num_classes, **options)
    side = 2 * model.spec.stride
    images = torch.randn(2, 3, side, side)
    assert [level.shape[1] for level in model.features(images)] == [16, 8, 4, 2]
    output = model(images)
    assert [tuple(image.shape) for image in output.reconstructions] == [(2, 3, side, side)] * 3


@pytest.mark.parametrize("stem_stride", [1, 2])
@pytest.mark.parametrize("block", [*KINDS, MIXED], ids=str)
def test_exact_columns_invert_networks_of_small_images(block: Any, stem_stride: int) -> None:
    options: dict[str, Any] = {
        "columns": 3,
        "num_classes": 5,
        "block": block,
        "stem_stride": stem_stride,
        "init": "fan_in",
        "layer_scale": 1.0,
    }
    images = torch.randn(4, 3, 16 * stem_stride, 16 * stem_stride)
    gradients = []
    for activations in ("exact", "stored"):
        torch.manual_seed(0)
        model = build([8, 12, 16, 20], [1, 1, 1, 1], activations=activations, **options).double()
        gradients.append(backward(model, images.double())[1])
        assert model.consistency.report() == []
    for name, stored in gradients[1].items():
        assert torch.allclose(gradients[0][name], stored, rtol=1e-2, atol=1e-3), name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stem_stride": 3}, "stem_stride must be 1, 2 or 4, got 3"),
        ({"init": "xavier"}, "init must be 'published' or 'fan_in', got 'xavier'"),
        ({"layer_scale": 0.0}, "layer_scale must be above 0"),
    ],
)
def test_impossible_values_are_rejected(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**wrong)


def test_a_checkpoint_records_the_stride_only_where_it_is_not_the_published_one() -> None:
    """Checkpoints of earlier releases do not have the key, and must still resume."""
    assert "stem_stride" not in network().spec.architecture
    assert network(stem_stride=2).spec.architecture["stem_stride"] == 2
