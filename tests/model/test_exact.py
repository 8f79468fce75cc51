"""Exact columns equal the reference with stored activations, for every kind of network."""

from __future__ import annotations

import itertools
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model import Network, build
from pipeline.model.column import Level
from tests.model.networks import KINDS, MIXED, Block, backward, has_running_statistics, network_with
from tests.model.reference import as_reference

COLUMNS = (4, 8, 16, 32)
PRECISIONS = ("fp32", "bf16")
ALPHAS = ("initial", "trained", "wide", "limit")
AXES = (COLUMNS, PRECISIONS, ALPHAS, (False, True), tuple(KINDS))
EVERY = list(itertools.product(*AXES))
# Half of them: those whose positions on the axes have an even sum. Any four values stand together
# in one of these, since the fifth axis can always make the sum even.
EVERY_FOUR = [
    case
    for case in EVERY
    if sum(axis.index(value) for axis, value in zip(AXES, case, strict=True)) % 2 == 0
]


def assert_equals_reference(
    network: Network,
    images: torch.Tensor,
    precision: str = "fp32",
    uniforms: torch.Tensor | None = None,
) -> None:
    """Outputs have equal bits, gradients differ by rounding only, the record is clean."""
    outputs, gradients = backward(network, images, precision, uniforms)
    expected, reference = backward(as_reference(deepcopy(network)), images, precision, uniforms)
    assert network.consistency.report() == []
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    # Only alpha of column 0 has a gradient here and none in the reference.
    assert all(not gradients[name].any() for name in gradients.keys() - reference.keys())
    ours = torch.cat([gradients[name].flatten() for name in reference]).double()
    theirs = torch.cat([gradient.flatten() for gradient in reference.values()]).double()
    assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())


def check(columns: int, precision: str, alphas: str, huge: bool, block: str) -> None:
    images = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(1))
    network = network_with(alphas, columns=columns, huge=huge, supervised=True, block=block)
    assert_equals_reference(network, images, precision)


# A stride that meets every value of every axis.
@pytest.mark.parametrize("case", EVERY[::11], ids=str)
def test_exact_columns_equal_the_reference(case: Any) -> None:
    check(*case)


def test_the_sample_of_cases_contains_every_value() -> None:
    for every, sample in zip(zip(*EVERY, strict=True), zip(*EVERY[::11], strict=True), strict=True):
        assert set(every) == set(sample)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY_FOUR, ids=str)
def test_exact_columns_equal_the_reference_in_every_combination_of_four(case: Any) -> None:
    check(*case)


def test_any_four_values_stand_together_in_a_case() -> None:
    assert len(EVERY_FOUR) == len(EVERY) / 2
    for left_out in range(len(AXES)):

        def others(case: tuple[Any, ...], left_out: int = left_out) -> tuple[Any, ...]:
            return case[:left_out] + case[left_out + 1 :]

        assert set(map(others, EVERY_FOUR)) == set(map(others, EVERY))


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 5),
    height=st.integers(32, 75),
    width=st.integers(32, 75),
    channels=st.lists(st.integers(2, 11), min_size=4, max_size=4),
    columns=st.integers(1, 6),
    huge=st.booleans(),
    block=st.sampled_from([*KINDS, MIXED]),
)
def test_exact_columns_equal_the_reference_for_any_shape(
    batch: int, height: int, width: int, channels: list[int], columns: int, huge: bool, block: Block
) -> None:
    batch += has_running_statistics(block)  # BatchNorm needs more than one value per channel
    network = network_with("wide", channels=channels, columns=columns, huge=huge, block=block)
    assert_equals_reference(network, torch.randn(batch, 3, height, width))


@pytest.mark.parametrize("stored", [1, 3, 6])
@pytest.mark.parametrize("block", KINDS)
def test_stored_columns_change_no_result(stored: int, block: str) -> None:
    options = {
        "columns": 6,
        "huge": True,
        "supervised": True,
        "block": block,
        "stored_columns": stored,
    }
    assert_equals_reference(network_with("wide", **options), torch.randn(3, 3, 64, 64))


def test_bf16_weights_as_under_deepspeed_give_the_same_bits() -> None:
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


def test_stochastic_depth_depends_on_its_input_only() -> None:
    network = network_with("trained", columns=5, drop_path=0.5)
    images = torch.randn(3, 3, 32, 32)
    uniforms = torch.rand(3, network.uniforms)
    assert_equals_reference(network, images, uniforms=uniforms)
    _, first = backward(network, images, uniforms=uniforms)
    _, other = backward(network, images, uniforms=1 - uniforms)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("frozen", ["stem.", "columns.0.", "columns.", ""])
def test_frozen_parts_change_no_result(frozen: str) -> None:
    network = network_with("wide", columns=4)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(
            not name.startswith(frozen) or not frozen or name.startswith("classifiers")
        )
    assert_equals_reference(network, torch.randn(2, 3, 32, 32))


def test_evaluation_equals_training_and_is_close_to_the_float_columns() -> None:
    network = network_with("trained", columns=8, huge=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        evaluated = network(images).logits[-1]
    assert torch.equal(evaluated, network(images).logits[-1])
    stored = build(**{**network.spec.architecture, "activations": "stored"})
    stored.load_state_dict(network.state_dict())
    difference = stored(images).logits[-1].detach() - evaluated
    assert 0 < float(difference.norm() / evaluated.norm()) < 1e-4  # bf16: 1e-2


def test_each_forward_pass_starts_a_new_consistency_record() -> None:
    network = network_with("trained", columns=4)
    backward(network, torch.randn(2, 3, 32, 32))
    first = network.consistency
    largest = first.max_abs.clone()
    backward(network, torch.randn(2, 3, 32, 32) * 2)
    assert network.consistency is not first
    assert torch.equal(first.max_abs, largest)
    assert not torch.equal(network.consistency.max_abs, largest)


@pytest.mark.slow
def test_compiled_levels_run_the_same_graph_twice() -> None:
    """Every kind of block, on a level of its own: each level is compiled by itself."""
    assert set(MIXED) == set(KINDS)
    network = network_with("wide", columns=2, block=MIXED, compile=True)
    backward(network, torch.randn(2, 3, 32, 32))
    assert network.consistency.report() == []


def test_convolutions_do_not_choose_their_algorithm_by_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The forward pass and the recompute run in different threads, which measure separately."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen: list[tuple[bool, bool]] = []
    branch = Level.branch

    def recording(level: Level, *inputs: Any) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), torch.backends.cudnn.benchmark))
        return branch(level, *inputs)

    monkeypatch.setattr(Level, "branch", recording)
    network = network_with("trained", columns=3)
    backward(network, torch.randn(2, 3, 32, 32))
    levels = 3 * 4
    assert seen == [(False, False)] * levels + [(True, False)] * levels
    assert torch.backends.cudnn.benchmark  # the user's own setting is back
