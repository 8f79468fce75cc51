"""Activation memory of the modes, and the activation budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.bench.live_memory import LiveBytes
from pipeline.config.memory import stage_memory
from pipeline.config.schema import ModelConfig, TrainConfig
from pipeline.model import build
from pipeline.train.loss import compound_terms
from tests.model.networks import backward, network_with

CHANNELS = [16, 24, 32, 64]


def test_the_activation_budget_stores_the_columns_that_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = network_with("trained", columns=6, stored_columns="auto")
    budget = network.activation_budget
    images = torch.randn(2, 3, 32, 32)
    _, first = backward(network, images)
    assert budget.stored_columns is None
    column = sum(budget.saved_bytes.values())
    monkeypatch.setattr("pipeline.model.activation_budget.free_memory", lambda device: 6.5 * column)
    _, second = backward(network, images)
    assert budget.stored_columns == 1 + int(0.8 * 6.5 - 2)
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-6), name
    backward(network, torch.randn(2, 3, 64, 32))
    assert budget.stored_columns is None  # another shape: measured again


def peak(columns: int, mode: str, alpha: float = 0.5, stored: int = 0) -> tuple[float, int]:
    """Return (peak live bytes of a step, elements of a column's maps).

    Parameters, gradients and inputs are not counted.
    """
    torch.manual_seed(0)
    options: dict[str, Any] = {"activations": mode, "fused": "eager"}
    if stored:
        options["stored_columns"] = stored
    network = build(CHANNELS, [1, 1, 1, 1], columns, 5, **options)
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
def test_a_column_costs_the_memory_of_its_remainders_only(alpha: float, bits: int) -> None:
    few, elements = peak(4, "exact", alpha)
    many, _ = peak(20, "exact", alpha)
    assert (many - few) / 16 <= elements * bits / 8 + 1000  # a few scalars per level
    if bits <= 1:
        assert many <= 1.12 * few


def test_exact_columns_take_the_least_memory_and_stored_columns_the_most() -> None:
    modes = ("exact", "checkpointed", "stored")
    few = [peak(4, mode)[0] for mode in modes]
    many = [peak(16, mode)[0] for mode in modes]
    assert few == sorted(few)
    assert many == sorted(many)
    assert many[0] - few[0] < 0.05 * (many[1] - few[1])
    assert many[1] - few[1] < many[2] - few[2]
    assert many[0] < peak(16, "exact", stored=8)[0] < many[2]


SIZES: dict[str, Any] = {"channels": (32, 64, 128, 256), "depths": (1, 1, 3, 1), "columns": 6}
SIDE = 64  # pixels
CLASSES = 10


def estimated(settings: dict[str, Any], precision: str, supervised: bool) -> float:
    """Activations per image in bytes, as the check of a job estimates them."""
    stored = settings.get("stored_columns", 0)
    train = TrainConfig.model_validate(
        {
            "epochs": 1,
            "base_lr": 1e-3,
            "image_size": SIDE,
            "precision": precision,
            "intermediate_supervision": supervised,
        }
    )
    model = ModelConfig(**SIZES, **settings)
    return stage_memory(model, train, classes=CLASSES, world_size=1, stored=stored).image


def measured(settings: dict[str, Any], precision: str, supervised: bool, images: int = 4) -> float:
    """Peak of live tensors in a step, per image in bytes; inputs included, parameters not."""
    torch.manual_seed(0)
    options: dict[str, Any] = SIZES | settings | {"fused": "eager", "supervised": supervised}
    network = build(num_classes=CLASSES, **options)
    if precision == "bf16":
        network.bfloat16()
        network.compute_in(torch.bfloat16)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [t for p in network.parameters() for t in (p, p.grad) if t is not None]
    with LiveBytes(known) as live:
        pixels = torch.rand(images, 3, SIDE, SIDE)
        output = network(pixels * 2 - 1)
        labels = torch.arange(images) % CLASSES
        compound_terms(output, pixels, labels).total.backward()
    return live.peak / images


@pytest.mark.parametrize(
    ("settings", "precision", "supervised"),
    [
        ({}, "fp32", False),
        ({}, "fp32", True),
        ({}, "bf16", False),
        ({"stored_columns": 2}, "bf16", False),
        ({"stored_columns": 6}, "bf16", True),
        ({"activations": "stored"}, "fp32", False),
        ({"activations": "checkpointed"}, "fp32", False),
        ({"block": "c2f"}, "fp32", False),
        ({"block": "c2f", "activations": "stored"}, "fp32", False),
        ({"block": "transformer", "activations": "stored"}, "fp32", False),
    ],
    ids=str,
)
def test_the_estimate_of_activations_is_close_to_the_live_tensors(
    settings: dict[str, Any], precision: str, supervised: bool
) -> None:
    arguments = (settings, precision, supervised)
    assert 0.8 < estimated(*arguments) / measured(*arguments) < 1.3
