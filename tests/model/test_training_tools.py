"""Autocast, loss scaling and hooks on modules, in every activations mode."""

from __future__ import annotations

import pytest
import torch

from tests.model.networks import gradients_of, prediction_sum, tiny_network

mode = pytest.mark.parametrize("activations", ["exact", "checkpointed", "stored"])


@mode
def test_autocast_gives_float32_gradients(activations: str) -> None:
    network = tiny_network(activations=activations)
    with torch.autocast("cpu", torch.bfloat16):
        loss = prediction_sum(network, torch.randn(2, 3, 32, 32))
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = gradients_of(network)
    assert gradients.keys() == dict(network.named_parameters()).keys()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
    assert network.consistency.report() == []


@mode
def test_a_grad_scaler_scales_and_steps(activations: str) -> None:
    network = tiny_network(activations=activations)
    images = torch.randn(2, 3, 32, 32)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    with torch.autocast("cpu", torch.float16):
        loss = prediction_sum(network, images)
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    scaled = gradients_of(network)
    scaler.step(optimizer)
    scaler.update()
    for name, parameter in network.named_parameters():
        expected = before[name] - 0.1 * scaled[name] / 1024
        assert torch.allclose(parameter, expected, rtol=1e-5, atol=1e-7), name
    assert any(not torch.equal(p, before[name]) for name, p in network.named_parameters())


@pytest.mark.parametrize(
    ("activations", "calls"), [("exact", 2), ("checkpointed", 2), ("stored", 1)]
)
def test_forward_hooks_run_again_in_a_recompute(activations: str, calls: int) -> None:
    network = tiny_network(activations=activations)
    seen = []
    network.get_submodule("columns.1.levels.2").register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape)
    )
    prediction_sum(network, torch.randn(2, 3, 32, 32)).backward()  # type: ignore[no-untyped-call]
    assert len(seen) == calls
