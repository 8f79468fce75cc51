"""Depth of parameters by the published rule, and which parameters decay."""

from __future__ import annotations

import pytest
import torch

from pipeline.model import Network, build
from pipeline.model.param_groups import decays, layer_id, num_layers


def model() -> Network:
    with torch.device("meta"):
        return build([8, 16, 24, 32], [1, 2, 6, 2], 8, 10, huge=True, supervised=True)


def test_heads_are_the_deepest_layer() -> None:
    network = model()
    assert num_layers(network.spec) == 11 + 8
    depths = {layer_id(name, network.spec) for name, _ in network.named_parameters()}
    assert depths == set(range(20))


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("stem.conv.weight", 0),
        ("columns.0.levels.0.blocks.0.norm.weight", 1),
        ("columns.0.levels.1.down.conv.weight", 2),
        ("columns.0.levels.1.blocks.1.gamma", 3),
        ("columns.3.levels.2.blocks.4.gamma", 11),
        ("columns.3.levels.2.up.norm.bias", 7),
        ("columns.3.levels.0.up_top.linear.weight", 4),
        ("columns.7.levels.3.blocks.1.expand.weight", 18),
        ("columns.5.levels.2.alpha", 6),
        ("classifiers.0.linear.weight", 19),
        ("decoders.1.project.bias", 19),
    ],
)
def test_depth_follows_the_published_rule(name: str, depth: int) -> None:
    assert layer_id(name, model().spec) == depth


def test_weight_decay_spares_one_dimensional_parameters_but_alpha() -> None:
    assert decays("columns.0.levels.0.blocks.0.expand.weight", 2, False)
    assert not decays("columns.0.levels.0.blocks.0.gamma", 1, True)
    assert decays("columns.0.levels.0.alpha", 1, True)
    assert not decays("columns.0.levels.0.alpha", 1, False)
