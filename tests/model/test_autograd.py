"""Exact columns under the ways in which training code calls autograd: right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from pipeline.model import Network, RevCol
from tests.model.networks import as_stored, gradients_of, prediction_sum, tiny_network

STORED = r"activations='stored'"


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal up to the stream's resolution, which F's layers amplify."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= 1e-3 * expected.norm() + 1e-6, name


def backward_gradients(network: Network, images: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    prediction_sum(network, images).backward()
    return gradients_of(network)


def test_the_gradient_of_the_input_alone_leaves_parameters_alone(images: Tensor) -> None:
    network = tiny_network()
    images.requires_grad_()
    (ours,) = torch.autograd.grad(prediction_sum(network, images), images)
    assert gradients_of(network) == {}
    (theirs,) = torch.autograd.grad(prediction_sum(as_stored(network), images), images)
    assert_close({"images": ours}, {"images": theirs})


def test_autograd_grad_of_all_parameters_equals_backward(images: Tensor) -> None:
    network = tiny_network()
    expected = backward_gradients(network, images)
    network.zero_grad()
    computed = torch.autograd.grad(prediction_sum(network, images), list(network.parameters()))
    assert gradients_of(network) == {}
    for (name, gradient), value in zip(expected.items(), computed, strict=True):
        assert torch.equal(gradient, value), name


def test_the_gradient_of_one_level_equals_that_of_backward(images: Tensor) -> None:
    network = tiny_network(columns=3)
    name = "columns.1.levels.2.alpha"
    expected = backward_gradients(network, images)[name]
    parameter = network.get_parameter(name)
    (computed,) = torch.autograd.grad(prediction_sum(network, images), parameter)
    assert torch.equal(computed, expected)


def test_functional_call_computes_with_the_given_parameters(images: Tensor) -> None:
    network = tiny_network()
    given = {
        name: (parameter.detach() * 1.5).requires_grad_()
        for name, parameter in network.named_parameters()
    }
    loss = functional_call(network, given, (images,)).logits[-1].square().sum()
    computed = dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True))
    assert network.consistency.report() == []  # the recompute used them too
    network.load_state_dict(given)
    expected = backward_gradients(network, images)
    assert all(torch.equal(computed[name], expected[name]) for name in expected)


def test_a_hook_on_a_parameter_fires_once(images: Tensor) -> None:
    network = tiny_network()
    expected = backward_gradients(network, images)
    for parameter in network.parameters():
        parameter.register_hook(lambda gradient: gradient * 2)
    doubled = backward_gradients(network, images)
    assert all(torch.equal(doubled[name], 2 * expected[name]) for name in expected)


@pytest.mark.parametrize("stored_columns", [0, 1])
def test_a_second_derivative_is_refused(images: Tensor, stored_columns: int) -> None:
    images.requires_grad_()
    network = tiny_network(stored_columns=stored_columns)
    with pytest.raises(RuntimeError, match=STORED):
        torch.autograd.grad(prediction_sum(network, images), images, create_graph=True)


def test_stored_columns_have_the_second_derivative_that_the_refusal_promises() -> None:
    network = as_stored(tiny_network()).double()
    images = torch.randn(1, 3, 32, 32, dtype=torch.double, requires_grad=True)
    direction = torch.randn_like(images)

    def slope(at: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(prediction_sum(network, at), at, create_graph=True)
        return (gradient * direction).sum()

    (second,) = torch.autograd.grad(slope(images), images)
    step = 1e-4 * torch.randn_like(images)
    difference = (slope(images + step) - slope(images - step)) / 2
    assert torch.allclose((second * step).sum(), difference, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("part", ["columns.0.levels.0.", "columns.1.levels.3."])
def test_parameters_changed_before_backward_are_refused(images: Tensor, part: str) -> None:
    network = tiny_network()
    loss = prediction_sum(network, images)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith(part):
                parameter.add_(0.1)
    column, level = part.split(".")[1:4:2]
    with pytest.raises(RuntimeError, match=rf"column {column}, level {level} was changed in place"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_two_backward_passes_double_the_gradients(images: Tensor) -> None:
    network = tiny_network(columns=3)
    loss = prediction_sum(network, images)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    once = gradients_of(network)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(torch.equal(2 * once[name], value) for name, value in gradients_of(network).items())
    assert network.consistency.report() == []


def test_a_second_backward_pass_through_used_up_columns_is_refused(images: Tensor) -> None:
    backbone = RevCol("ConvNeXt", [8] * 4, [1] * 4, 2)
    maps = backbone(images)
    maps[3].sum().backward()
    with pytest.raises(RuntimeError, match=f"retain_graph=True.*{STORED}"):
        maps[0].sum().backward()


def test_a_loss_on_some_of_the_maps_gives_the_gradients_of_stored_columns(images: Tensor) -> None:
    exact = RevCol("ConvNeXt", [8] * 4, [1] * 4, 3)
    stored = RevCol("ConvNeXt", [8] * 4, [1] * 4, 3, save_memory=False)
    stored.load_state_dict(exact.state_dict())
    for backbone in (exact, stored):
        backbone(images)[1].square().sum().backward()
    ours = gradients_of(exact)
    # The last column's levels 2 and 3 have no effect on map 1.
    unused = ("columns.2.levels.2", "columns.2.levels.3")
    assert not [name for name in ours if name.startswith(unused)]
    assert_close(ours, gradients_of(stored))
    assert exact.consistency.report() == []


def test_an_empty_batch_gives_zero_gradients() -> None:
    network = tiny_network()
    network(torch.empty(0, 3, 32, 32)).logits[-1].sum().backward()
    gradients = gradients_of(network)
    assert gradients.keys() == dict(network.named_parameters()).keys()
    assert not any(gradient.any() for gradient in gradients.values())


def test_returned_maps_can_be_changed_in_place(images: Tensor) -> None:
    backbone = RevCol("ConvNeXt", [8] * 4, [1] * 4, 2)

    def gradients(change: Callable[[list[Tensor]], Any]) -> dict[str, Tensor]:
        backbone.zero_grad()
        maps = change(backbone(images))
        torch.stack([m.square().sum() for m in maps]).sum().backward()
        return gradients_of(backbone)

    in_place = gradients(lambda maps: [m.mul_(2).relu_() for m in maps])
    expected = gradients(lambda maps: [(m * 2).relu() for m in maps])
    assert backbone.consistency.report() == []
    assert all(torch.equal(in_place[name], expected[name]) for name in expected)


def test_transforms_of_torch_func_are_refused(images: Tensor) -> None:
    network = tiny_network()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        value: Tensor = functional_call(network, parameters, (images,)).logits[-1].sum()
        return value

    with pytest.raises(RuntimeError, match=STORED):
        torch.func.grad(loss)(dict(network.named_parameters()))


@pytest.mark.slow
def test_stored_columns_give_the_gradients_per_sample_that_the_refusal_promises(
    images: Tensor,
) -> None:
    network = as_stored(tiny_network())
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        logits: Tensor = functional_call(network, parameters, (image[None],)).logits[-1]
        return logits.square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    summed = {name: gradient.sum(0) for name, gradient in per_sample.items()}
    assert_close(summed, backward_gradients(network, images))
