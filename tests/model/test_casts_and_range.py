"""Weights of other dtypes, and a stream beyond its range, in training code of others."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

from pipeline.model import Network, RevCol
from tests.model.networks import gradients_of, prediction_sum, tiny_network

CASTS = {
    "half": lambda network: network.half(),
    "bfloat16": lambda network: network.bfloat16(),
    "to": lambda network: network.to(torch.bfloat16),
    "double": lambda network: network.double(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("activations", ["exact", "checkpointed", "stored"])
def test_a_cast_network_trains_and_evaluates(cast: str, activations: str) -> None:
    network = CASTS[cast](tiny_network(activations=activations))
    dtype = network.stem.conv.weight.dtype
    images = torch.randn(2, 3, 32, 32, dtype=dtype)
    prediction_sum(network, images).backward()
    gradients = gradients_of(network)
    assert len(gradients) == len(list(network.parameters()))
    assert all(g.dtype == dtype and bool(g.isfinite().all()) for g in gradients.values())
    assert network.consistency.report() == []
    with torch.no_grad():
        assert network.eval()(images).logits[-1].isfinite().all()


def test_a_network_cast_back_computes_as_before() -> None:
    network = tiny_network()
    images = torch.randn(2, 3, 32, 32)
    network.half().float()
    expected = prediction_sum(network, images)
    again = tiny_network()
    again.load_state_dict(network.state_dict())
    assert torch.equal(prediction_sum(again, images), expected)


def overflowing(network: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        network.get_parameter("columns.1.levels.2.down.norm.bias").fill_(9000.0)
    return network


def test_an_overflow_warns_once_in_training_and_gradients_stay_finite() -> None:
    network = overflowing(tiny_network())
    images = torch.randn(2, 3, 32, 32)
    with pytest.warns(RuntimeWarning, match=r"column 1, level 2.*ends at 8192.*fraction_bits"):
        prediction_sum(network, images).backward()  # type: ignore[no-untyped-call]
    assert all(gradient.isfinite().all() for gradient in gradients_of(network).values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prediction_sum(network, images)


def test_an_overflow_warns_in_evaluation() -> None:
    network = overflowing(tiny_network()).eval()
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="column 1, level 2"):
        network(torch.randn(2, 3, 32, 32))


def test_an_engine_that_skips_steps_is_not_warned() -> None:
    network = overflowing(tiny_network())
    assert isinstance(network, Network)
    network.skip_on_overflow = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prediction_sum(network, torch.randn(2, 3, 32, 32)).backward()  # type: ignore[no-untyped-call]
    assert not all(gradient.isfinite().all() for gradient in gradients_of(network).values())


def test_a_mismatch_warns_at_the_next_pass() -> None:
    network = tiny_network()
    images = torch.randn(2, 3, 32, 32)
    prediction_sum(network, images).backward()  # type: ignore[no-untyped-call]
    network.consistency.mismatched[1, 3] = 1
    with pytest.warns(RuntimeWarning, match="column 1, level 3: 1 elements differ"):
        prediction_sum(network, images)


def test_fewer_fraction_bits_widen_the_range_of_a_feature_pyramid() -> None:
    backbone = overflowing(RevCol("ConvNeXt", [8] * 4, [1] * 4, 2, fraction_bits=16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = backbone(torch.randn(2, 3, 32, 32))
    assert maps[2].abs().max() > 8192


@pytest.mark.parametrize("activations", ["exact", "checkpointed", "stored"])
def test_copies_and_pickles_compute_the_same(activations: str) -> None:
    network = tiny_network(activations=activations)
    images = torch.randn(2, 3, 32, 32)
    prediction_sum(network, images).backward()  # type: ignore[no-untyped-call]
    network.zero_grad()
    expected = prediction_sum(network, images)
    for same in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(prediction_sum(same, images), expected)
