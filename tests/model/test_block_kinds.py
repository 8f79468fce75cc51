"""Contract of a block kind. Every kind in ``pipeline/blocks/kinds`` must pass these tests."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from pipeline.blocks import registry
from pipeline.model import build
from tests.model.networks import KINDS, backward, network_with

CHANNELS = 16
PARTS = ("block", "stem", "stem of stride 2", "stem of stride 1", "down", "up")

pytestmark = pytest.mark.parametrize("name", KINDS)


def modules_of(name: str) -> dict[str, tuple[nn.Module, Tensor, tuple[int, ...]]]:
    """Each module of a kind with an input and the shape that it must return."""
    kind = registry.kind(name)
    maps = torch.randn(2, 8, 6, CHANNELS)
    return {
        "block": (kind.block(CHANNELS), maps, (2, 8, 6, CHANNELS)),
        "stem": (kind.stem(CHANNELS, 4), torch.randn(2, 3, 32, 24), (2, 8, 6, CHANNELS)),
        "stem of stride 2": (
            kind.stem(CHANNELS, 2),
            torch.randn(2, 3, 16, 12),
            (2, 8, 6, CHANNELS),
        ),
        "stem of stride 1": (kind.stem(CHANNELS, 1), torch.randn(2, 3, 8, 6), (2, 8, 6, CHANNELS)),
        "down": (kind.down(CHANNELS, 24), maps, (2, 4, 3, 24)),
        "up": (kind.up(CHANNELS, 12), maps, (2, 8, 6, 12)),
    }


def test_facts_describe_the_modules(name: str) -> None:
    facts = registry.facts()[name]
    assert facts.title
    parts = [module for module, _, _ in modules_of(name).values()]
    assert facts.running_statistics is any(list(part.buffers()) for part in parts)
    parameters = [parameter for parameter, _ in parts[0].named_parameters()]
    for ours in facts.published_names:
        assert any(parameter.startswith(ours) for parameter in parameters), ours


def test_a_dropped_block_returns_its_input_or_drop_path_is_refused(name: str) -> None:
    if not registry.facts()[name].shortcut:
        with pytest.raises(ValueError, match="drop_path needs blocks with a shortcut"):
            network_with("initial", columns=2, block=name, drop_path=0.1)
        return
    block, x, _ = modules_of(name)["block"]
    for parameter in block.parameters():
        parameter.data.uniform_(-1, 1)
    out = block(x, torch.tensor([0.0, 1.0]))
    assert torch.equal(out[0], x[0])
    assert not torch.equal(out[1], x[1])


@pytest.mark.parametrize("part", PARTS)
def test_forward_and_backward_have_the_documented_shapes(name: str, part: str) -> None:
    module, x, shape = modules_of(name)[part]
    x.requires_grad_()
    out = module(x)
    assert out.shape == shape
    assert out.is_contiguous()
    out.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("part", PARTS)
def test_a_recompute_gives_the_same_bits_and_draws_no_random_numbers(name: str, part: str) -> None:
    module, x, _ = modules_of(name)[part]
    generator_state = torch.get_rng_state()
    with torch.no_grad():
        first = module(x)
    second = module(x.clone().requires_grad_())
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), generator_state)


def test_exact_columns_invert_and_give_the_gradients_of_stored_ones(name: str) -> None:
    network = network_with("trained", columns=4, block=name)
    same = build(**{**network.spec.architecture, "stored_columns": 4})
    same.load_state_dict(network.state_dict())
    images = torch.randn(3, 3, 64, 64)
    outputs, gradients = backward(network, images)
    expected_outputs, expected = backward(same, images)
    assert network.consistency.report() == []
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected_outputs, strict=True))
    assert gradients.keys() == expected.keys()
    for parameter, gradient in gradients.items():
        assert torch.equal(gradient, expected[parameter]), parameter


def test_a_state_dict_restores_the_network(name: str) -> None:
    network = network_with("trained", columns=2, block=name)
    backward(network, torch.randn(3, 3, 64, 64))  # so that running statistics have changed
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    restored = build(**network.spec.architecture)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network.eval()(images).logits[-1]
        assert not torch.equal(restored.eval()(images).logits[-1], expected)
        restored.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(restored(images).logits[-1], expected)
