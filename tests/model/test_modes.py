"""Activation modes share parameters and results; buffers are updated once per step."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from pipeline.blocks import registry
from pipeline.model import NetworkSpec, RevCol, build
from tests.model.networks import (
    KINDS,
    MIXED,
    WITHOUT_STATISTICS,
    Block,
    backward,
    has_running_statistics,
    network_with,
)


@pytest.mark.parametrize("block", [*KINDS, MIXED, WITHOUT_STATISTICS])
def test_modes_share_parameters_and_agree(block: Block) -> None:
    images = torch.randn(3, 3, 64, 96)
    network = network_with("trained", columns=8, huge=True, supervised=True, block=block)
    gradients: dict[str, torch.Tensor] = {}
    buffers: dict[str, dict[str, torch.Tensor]] = {}
    for mode in ("exact", "checkpointed", "stored"):
        same = build(**{**network.spec.architecture, "activations": mode})
        same.load_state_dict(network.state_dict())
        _, by_name = backward(same, images)
        assert all(p.grad is not None for p in same.parameters())
        gradients[mode] = torch.cat([by_name[name].flatten() for name in sorted(by_name)])
        buffers[mode] = {name: buffer.double() for name, buffer in same.named_buffers()}
        counters = [b for name, b in buffers[mode].items() if name.endswith("num_batches_tracked")]
        assert all(int(counter) == 1 for counter in counters)

    def distance(mode: str) -> float:
        stored = gradients["stored"]
        return float((gradients[mode] - stored).norm() / stored.norm())

    assert distance("checkpointed") < 1e-6
    # The stream's resolution after 8 columns. BatchNorm over 18 values amplifies it.
    assert distance("exact") < (0.1 if has_running_statistics(block) else 2e-3)
    for name, buffer in buffers["stored"].items():  # updated once, not again by a recompute
        assert torch.equal(buffer, buffers["checkpointed"][name]), name
        assert torch.allclose(buffer, buffers["exact"][name], atol=1e-3), name


def test_the_detection_backbone_has_the_published_interface() -> None:
    backbone = RevCol(
        kernel="C2f",
        channels=[32, 64, 96, 128],
        layers=[2, 3, 6, 3],
        num_subnet=5,
        save_memory=True,
    )
    assert backbone.channel == [32, 64, 96, 128]
    maps = backbone(torch.randn(2, 3, 72, 104))
    assert [tuple(m.shape) for m in maps] == [
        (2, 32, 18, 26),
        (2, 64, 9, 13),
        (2, 96, 4, 6),
        (2, 128, 2, 3),
    ]
    torch.stack([m.square().mean() for m in maps]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())
    assert backbone.consistency.report() == []
    buffers = dict(backbone.named_buffers())
    counters = {int(b) for name, b in buffers.items() if name.endswith("num_batches_tracked")}
    assert counters == {1}
    backbone.eval()
    with torch.no_grad():
        first = backbone(torch.ones(1, 3, 64, 64))[3]
        second = backbone(torch.ones(1, 3, 64, 64))[3]
    assert torch.equal(first, second)


# Names are case-insensitive: users write kernel="C2f".
@pytest.mark.parametrize(
    "kernel", [*(kind.upper() for kind in KINDS), [kind.title() for kind in MIXED]], ids=str
)
@pytest.mark.parametrize("size", [(96, 64), (70, 107)])
def test_feature_pyramids_of_both_modes_agree_for_any_size(
    kernel: Any, size: tuple[int, int]
) -> None:
    options: dict[str, Any] = {
        "kernel": kernel,
        "channels": [8, 16, 24, 32],
        "layers": [1, 1, 1, 1],
        "num_subnet": 4,
        "huge": True,
    }
    exact = RevCol(**options)
    stored = RevCol(**options, save_memory=False)
    stored.load_state_dict(exact.state_dict())
    images = torch.randn(2, 3, *size)
    for a, b in zip(exact(images), stored(images), strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block": "resnet"}, "block must be one of"),
        ({"block": KINDS[:2]}, "four of them"),
        ({"activations": "stored", "stored_columns": 2}, "needs activations 'exact'"),
        ({"fraction_bits": 30}, "fraction_bits"),
    ],
)
def test_an_impossible_network_is_rejected(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        NetworkSpec((8, 8, 8, 8), (1, 1, 1, 1), 4, 5, **wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_drop_path_is_accepted_only_by_kinds_with_a_shortcut(kind: str) -> None:
    options: dict[str, Any] = {"block": kind, "drop_path": 0.1}
    if registry.facts()[kind].shortcut:
        NetworkSpec((8, 8, 8, 8), (1, 1, 1, 1), 4, 5, **options)
    else:
        with pytest.raises(ValueError, match="shortcut"):
            NetworkSpec((8, 8, 8, 8), (1, 1, 1, 1), 4, 5, **options)
