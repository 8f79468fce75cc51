"""torch.compile, torch.export and torch.jit.trace of whole networks, in every activations mode."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from pipeline.model import Network, Output, RevCol
from tests.model.networks import as_stored, gradients_of, prediction_sum, tiny_network

MODES = ("exact", "checkpointed", "stored")
MOST_GRAPH_BREAKS = 4
mode = pytest.mark.parametrize("activations", MODES)


def compiled(network: Network) -> Any:
    """Compile without code generation: what is tested is what the compiler can trace."""
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(network, backend="aot_eager")


def graph_breaks() -> int:
    return sum(counters["graph_break"].values())


@pytest.mark.slow
@mode
def test_a_compiled_network_trains_with_few_graph_breaks(activations: str) -> None:
    network = tiny_network(activations=activations)
    images = torch.randn(2, 3, 32, 32)
    expected = prediction_sum(network, images)
    expected.backward()  # type: ignore[no-untyped-call]
    gradients = gradients_of(network)
    network.zero_grad()
    loss = prediction_sum(compiled(network), images)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(loss, expected, rtol=1e-5)
    for name, gradient in gradients_of(network).items():
        assert torch.allclose(gradient, gradients[name], rtol=1e-4, atol=1e-6), name
    assert network.consistency.report() == []
    assert counters["stats"]["unique_graphs"] > 0
    assert graph_breaks() <= MOST_GRAPH_BREAKS


@pytest.mark.slow
@mode
def test_a_compiled_network_evaluates_images_of_two_sizes(activations: str) -> None:
    network = tiny_network(activations=activations).eval()
    compiled_network = compiled(network)
    with torch.no_grad():
        for size in (32, 64):
            images = torch.randn(2, 3, size, size)
            expected = network(images).logits[-1]
            counters.clear()
            assert torch.allclose(compiled_network(images).logits[-1], expected, atol=1e-6)
            assert graph_breaks() <= MOST_GRAPH_BREAKS


@pytest.mark.slow
@mode
def test_an_exported_network_computes_the_plain_path(activations: str) -> None:
    network = tiny_network(activations=activations).eval()
    images = torch.randn(2, 3, 32, 32)
    saved = io.BytesIO()
    torch.export.save(torch.export.export(network, (images,)), saved)
    saved.seek(0)
    output = torch.export.load(saved).module()(images)
    assert isinstance(output, Output)
    assert torch.equal(output.logits[-1], as_stored(network)(images).logits[-1])


@pytest.mark.slow
@pytest.mark.parametrize("block", ["ConvNeXt", "C2f"])
def test_a_pyramid_is_exported_for_any_height_and_width(block: str) -> None:
    backbone = RevCol(block, [8] * 4, [1] * 4, 2, huge=True).eval()
    stored = RevCol(block, [8] * 4, [1] * 4, 2, huge=True, save_memory=False).eval()
    stored.load_state_dict(backbone.state_dict())
    any_size = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(
        backbone, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(any_size,)
    )
    for shape in ((1, 3, 64, 64), (3, 3, 70, 107)):
        images = torch.randn(*shape)
        maps = zip(program.module()(images), stored(images), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in maps)


@pytest.mark.slow
@mode
def test_an_onnx_program_predicts_in_onnx_runtime(activations: str, tmp_path: Path) -> None:
    """Images of any batch, height and width. Numbers differ: another runtime, other kernels."""
    network = tiny_network(activations=activations).eval()
    any_size = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.onnx.export(
        network, (torch.randn(2, 3, 64, 96),), dynamo=True, dynamic_shapes=(any_size,)
    )
    assert program is not None
    program.save(tmp_path / "network.onnx")
    onnx.checker.check_model(tmp_path / "network.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    for shape in ((1, 3, 64, 64), (5, 3, 96, 64)):
        images = torch.randn(*shape)
        expected = as_stored(network)(images).logits[-1]
        outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert torch.allclose(torch.from_numpy(outputs[-1]), expected, rtol=1e-4, atol=1e-5)


@mode
def test_a_traced_network_predicts(activations: str) -> None:
    network = tiny_network(activations=activations).eval()
    traced = torch.jit.trace(network, torch.randn(2, 3, 64, 64))  # type: ignore[no-untyped-call]
    for size in (64, 96):
        images = torch.randn(3, 3, size, size)
        expected = as_stored(network)(images).logits[-1]
        assert torch.allclose(traced(images), expected, atol=1e-6)


def test_a_traced_pyramid_returns_its_maps() -> None:
    backbone = RevCol("ConvNeXt", [8] * 4, [1] * 4, 2).eval()
    traced = torch.jit.trace(backbone, torch.randn(1, 3, 64, 64))  # type: ignore[no-untyped-call]
    maps = traced(torch.randn(2, 3, 96, 64))
    assert [tuple(m.shape) for m in maps] == [
        (2, 8, 24, 16),
        (2, 8, 12, 8),
        (2, 8, 6, 4),
        (2, 8, 3, 2),
    ]


def test_tensors_in_an_output_are_found_and_put_back() -> None:
    output = Output([torch.zeros(1)], [torch.ones(2)])
    doubled = pytree.tree_map(lambda tensor: tensor + 1, output)
    assert isinstance(doubled, Output)
    assert doubled.logits[0].tolist() == [1]
    assert doubled.reconstructions[0].tolist() == [2, 2]
