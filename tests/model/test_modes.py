"""Modes share parameters and results; memory, running statistics and the pyramid interface."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.bench.live_memory import LiveBytes
from pipeline.model import NetworkSpec, RevCol, build
from tests.model.test_exact import backward, network_with

CHANNELS = [16, 24, 32, 64]


@pytest.mark.parametrize(
    "block", ["convnext", "c2f", ("convnext", "convnext", "transformer", "transformer")]
)
def test_modes_share_parameters_and_agree(block: Any) -> None:
    images, found = torch.randn(3, 3, 64, 96), {}
    network = network_with("trained", columns=8, huge=True, supervised=True, block=block)
    for mode in ("exact", "checkpointed", "stored"):
        same = build(**{**network.spec.architecture, "activations": mode})
        same.load_state_dict(network.state_dict())
        _, gradients = backward(same, images)
        assert all(p.grad is not None for p in same.parameters())
        buffers = {name: buffer.double() for name, buffer in same.named_buffers()}
        assert all(
            int(buffer) == 1
            for name, buffer in buffers.items()
            if name.endswith("num_batches_tracked")
        )
        found[mode] = torch.cat([gradients[name].flatten() for name in sorted(gradients)]), buffers
    (exact, exact_buffers), (checkpointed, checkpointed_buffers), (stored, stored_buffers) = (
        found.values()
    )
    assert (
        torch.equal(checkpointed, stored)
        or float((checkpointed - stored).norm() / stored.norm()) < 1e-6
    )
    limit = (
        0.1 if block == "c2f" else 2e-3
    )  # the stream's resolution after 8 columns; BatchNorm over 18 values amplifies it
    assert float((exact - stored).norm() / stored.norm()) < limit
    for name, buffer in stored_buffers.items():  # updated once, not again by a recompute
        assert torch.equal(buffer, checkpointed_buffers[name]), name
        assert torch.allclose(buffer, exact_buffers[name], atol=1e-3), name


def test_stored_columns_by_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_with("trained", columns=6, stored_columns="auto")
    images = torch.randn(2, 3, 32, 32)
    _, first = backward(network, images)
    assert network.room.chosen is None
    column = sum(network.room.kept.values())
    monkeypatch.setattr("pipeline.model.activation_budget.free_memory", lambda device: 6.5 * column)
    _, second = backward(network, images)
    assert network.room.chosen == 1 + int(0.8 * 6.5 - 2)
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-6), name
    backward(network, torch.randn(2, 3, 64, 32))
    assert network.room.chosen is None  # another shape: measured anew


def peak(columns: int, mode: str, alpha: float = 0.5, stored: int = 0) -> tuple[float, int]:
    """(peak live bytes of a step, elements of a column's maps), parameters, gradients and inputs aside."""
    torch.manual_seed(0)
    stored_columns = {"stored_columns": stored} if stored else {}
    network = build(
        CHANNELS, [1, 1, 1, 1], columns, 5, activations=mode, fused="eager", **stored_columns
    )  # type: ignore[arg-type]
    images = torch.randn(4, 3, 64, 64)
    for name, parameter in network.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
        if name.endswith("alpha"):
            parameter.data.fill_(alpha)
    known = [t for p in network.parameters() for t in (p, p.grad) if t is not None]
    with LiveBytes([*known, images]) as live:
        network(images).logits[-1].sum().backward()
    return live.peak, 4 * sum(c * (16 >> i) ** 2 for i, c in enumerate(CHANNELS))


@pytest.mark.parametrize(
    ("alpha", "bits"), [(1.5, 0), (0.5, 1), (0.3, 2), (0.1, 4), (0.01, 8), (0.001, 16)]
)
def test_a_column_costs_its_remainders_and_nothing_else(alpha: float, bits: int) -> None:
    (few, elements), (many, _) = peak(4, "exact", alpha), peak(20, "exact", alpha)
    assert (many - few) / 16 <= elements * bits / 8 + 1000  # a few scalars a level
    if bits <= 1:
        assert many <= 1.12 * few


def test_memory_of_the_modes_is_ordered() -> None:
    few, many = (
        [peak(n, mode)[0] for mode in ("exact", "checkpointed", "stored")] for n in (4, 16)
    )
    assert few == sorted(few) and many == sorted(many)
    assert many[0] - few[0] < 0.05 * (many[1] - few[1]) < 0.05 * (many[2] - few[2])
    assert many[0] < peak(16, "exact", stored=8)[0] < many[2]


def test_the_detection_backbone_as_users_write_it() -> None:
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
    assert {
        int(b) for name, b in backbone.named_buffers() if name.endswith("num_batches_tracked")
    } == {1}
    backbone.eval()
    with torch.no_grad():
        assert torch.equal(
            backbone(torch.ones(1, 3, 64, 64))[3], backbone(torch.ones(1, 3, 64, 64))[3]
        )


@pytest.mark.parametrize(
    "kernel", ["ConvNeXt", "C2f", ["ConvNeXt", "ConvNeXt", "Transformer", "Transformer"]]
)
@pytest.mark.parametrize("size", [(96, 64), (70, 107)])
def test_pyramids_of_any_size(kernel: Any, size: tuple[int, int]) -> None:
    options: dict[str, Any] = {
        "kernel": kernel,
        "channels": [8, 16, 24, 32],
        "layers": [1, 1, 1, 1],
        "num_subnet": 4,
    }
    options["huge"] = True
    exact = RevCol(**options)
    stored = RevCol(**options, save_memory=False)
    stored.load_state_dict(exact.state_dict())
    images = torch.randn(2, 3, *size)
    for a, b in zip(exact(images), stored(images), strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block": "resnet"}, "block must be one of"),
        ({"block": ("convnext", "c2f")}, "four of them"),
        ({"block": "c2f", "drop_path": 0.1}, "shortcut"),
        ({"activations": "stored", "stored_columns": 2}, "belongs to activations 'exact'"),
        ({"fraction_bits": 30}, "fraction_bits"),
    ],
)
def test_what_a_network_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkSpec((8, 8, 8, 8), (1, 1, 1, 1), 4, 5, **wrong)
