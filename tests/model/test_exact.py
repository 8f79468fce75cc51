"""Exact columns against the stored evaluation of the same arithmetic: nothing may differ, whatever the network."""

from __future__ import annotations

import itertools
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.blocks import registry
from pipeline.model import Network, build
from tests.model.reference import as_reference

COLUMNS, PRECISIONS, ALPHAS = (
    (4, 8, 16, 32),
    ("fp32", "bf16"),
    ("initial", "trained", "wide", "limit"),
)
BLOCKS = tuple(registry.facts())
EVERY = list(itertools.product(COLUMNS, PRECISIONS, ALPHAS, (False, True), BLOCKS))


def network_with(alphas: str, **options: Any) -> Network:
    """A small network; ``alphas``: 'initial' weights, or trained-like ones with alpha in [0.1, 1], [-2, 2] or +-1e-3."""
    torch.manual_seed(0)
    network = build(
        **{"channels": [8, 12, 16, 20], "depths": [1, 1, 2, 1], "num_classes": 5, **options}
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if alphas != "initial" and name.rpartition(".")[2].startswith("gamma"):
                parameter.uniform_(-0.5, 0.5)
            if name.endswith("alpha") and alphas == "trained":
                parameter.uniform_(0.1, 1)
            if name.endswith("alpha") and alphas == "wide":
                parameter.uniform_(-2, 2)
            if name.endswith("alpha") and alphas == "limit":
                parameter.fill_(1e-3).mul_(torch.where(torch.rand_like(parameter) < 0.5, -1.0, 1.0))
    return network


def backward(
    network: Network,
    images: torch.Tensor,
    precision: str = "fp32",
    uniforms: torch.Tensor | None = None,
) -> Any:
    """(outputs, {parameter: gradient}) of one pass."""
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out = network(images, uniforms)
        loss = sum((value.float() ** 2).mean() for value in (*out.logits, *out.reconstructions))
    assert isinstance(loss, torch.Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None
    }
    return (*out.logits, *out.reconstructions), gradients


def compare(
    network: Network,
    images: torch.Tensor,
    precision: str = "fp32",
    uniforms: torch.Tensor | None = None,
) -> None:
    outputs, gradients = backward(network, images, precision, uniforms)
    expected, reference = backward(as_reference(deepcopy(network)), images, precision, uniforms)
    assert network.consistency.report() == []
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert all(
        not gradients[name].any() for name in gradients.keys() - reference.keys()
    )  # alpha of column 0
    ours, theirs = (
        torch.cat([g[name].flatten() for name in reference]).double()
        for g in (gradients, reference)
    )
    assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())


def check(columns: int, precision: str, alphas: str, huge: bool, block: str) -> None:
    images = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(1))
    compare(
        network_with(alphas, columns=columns, huge=huge, supervised=True, block=block),
        images,
        precision,
    )


@pytest.mark.parametrize(
    "case", EVERY[::11], ids=str
)  # a stride that meets every value of every axis
def test_equals_the_stored_evaluation(case: Any) -> None:
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_equals_the_stored_evaluation_everywhere(case: Any) -> None:
    check(*case)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(32, 75),
    st.integers(32, 75),
    st.lists(st.integers(2, 11), min_size=4, max_size=4),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from(["convnext", "transformer", ("convnext", "convnext", "transformer", "c2f")]),
)
def test_any_shape(
    batch: int, height: int, width: int, channels: list[int], columns: int, huge: bool, block: Any
) -> None:
    batch += block[-1] == "c2f"  # BatchNorm needs more than one value a channel
    network = network_with("wide", channels=channels, columns=columns, huge=huge, block=block)
    compare(network, torch.randn(batch, 3, height, width))


@pytest.mark.parametrize("stored", [1, 3, 6])
@pytest.mark.parametrize("block", ["convnext", "c2f"])
def test_stored_columns_change_nothing(stored: int, block: str) -> None:
    options = {
        "columns": 6,
        "huge": True,
        "supervised": True,
        "block": block,
        "stored_columns": stored,
    }
    compare(network_with("wide", **options), torch.randn(3, 3, 64, 64))


def test_weights_in_bf16_as_under_deepspeed_give_the_same_bits() -> None:
    network = network_with("wide", columns=6, huge=True, supervised=True).bfloat16()
    network.compute_in(torch.bfloat16)
    images = torch.randn(2, 3, 64, 64)
    outputs, gradients = backward(network, images)
    for same in (
        as_reference(deepcopy(network)),
        network_with("wide", **{**asdict(network.spec), "stored_columns": 6}),
    ):
        same.load_state_dict(network.state_dict())
        same.bfloat16().compute_in(torch.bfloat16)
        expected, reference = backward(same, images)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        assert all(torch.equal(gradients[name], reference[name]) for name in reference)
    assert network.consistency.report() == []


def test_stochastic_depth_is_an_input() -> None:
    network = network_with("trained", columns=5, drop_path=0.5)
    images, uniforms = torch.randn(3, 3, 32, 32), torch.rand(3, network.uniforms)
    compare(network, images, uniforms=uniforms)
    _, first = backward(network, images, uniforms=uniforms)
    _, other = backward(network, images, uniforms=1 - uniforms)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_parts_may_be_frozen() -> None:
    for frozen in ("stem.", "columns.0.", "columns.", ""):
        network = network_with("wide", columns=4)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(
                not name.startswith(frozen) or not frozen or name.startswith("classifiers")
            )
        compare(network, torch.randn(2, 3, 32, 32))


def test_evaluation_is_the_training_forward_pass_and_near_the_stored_one() -> None:
    network = network_with("trained", columns=8, huge=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        evaluated = network(images).logits[-1]
    assert torch.equal(evaluated, network(images).logits[-1])
    stored = build(**{**network.spec.architecture, "activations": "stored"})
    stored.load_state_dict(network.state_dict())
    difference = stored(images).logits[-1].detach() - evaluated
    assert 0 < float(difference.norm() / evaluated.norm()) < 1e-4  # bf16: 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_compiled_levels_run_the_same_graph_twice(block: str) -> None:
    network = network_with("wide", columns=3, block=block, compile=True)
    backward(network, torch.randn(2, 3, 32, 32))
    assert network.consistency.report() == []
