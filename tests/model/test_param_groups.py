"""The published depth rule, and what decays."""

from __future__ import annotations

import torch

from pipeline.model import Network, build
from pipeline.model.param_groups import decays, layer_id, num_layers


def model() -> Network:
    with torch.device("meta"):
        return build([8, 16, 24, 32], [1, 2, 6, 2], 8, 10, huge=True, supervised=True)


def test_depth_of_parameters() -> None:
    spec = model().spec
    assert num_layers(spec) == 11 + 8
    expected = {
        "stem.conv.weight": 0,
        "columns.0.levels.0.blocks.0.norm.weight": 1,
        "columns.0.levels.1.down.conv.weight": 2,
        "columns.0.levels.1.blocks.1.gamma": 3,
        "columns.3.levels.2.up.norm.bias": 7,
        "columns.3.levels.0.up_top.linear.weight": 4,
        "columns.7.levels.3.blocks.1.expand.weight": 18,
        "columns.5.levels.2.alpha": 6,
        "classifiers.0.linear.weight": 19,
        "decoders.1.project.bias": 19,
    }
    assert {name: layer_id(name, spec) for name in expected} == expected
    assert all(0 <= layer_id(name, spec) <= 19 for name, _ in model().named_parameters())


def test_decay() -> None:
    assert decays("columns.0.levels.0.blocks.0.expand.weight", 2, False)
    assert not decays("columns.0.levels.0.blocks.0.gamma", 1, True)
    assert decays("columns.0.levels.0.alpha", 1, True) and not decays(
        "columns.0.levels.0.alpha", 1, False
    )
