"""torch.compile of levels: every kind of level gets its graph, and a limit is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pipeline.model import Network, build, compiled_level
from pipeline.model.compiled_level import TooManyGraphs


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Compile with a backend that only counts; one item per graph."""
    compiled: list[int] = []
    torch_compile = torch.compile

    def count(module: Any, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        compiled.append(len(inputs))
        forward: Callable[..., Any] = module.forward
        return forward

    def compile_counting(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
        counted: Callable[..., Any] = torch_compile(function, dynamic=dynamic, backend=count)
        return counted

    monkeypatch.setattr(torch, "compile", compile_counting)
    torch._dynamo.reset()
    yield compiled
    torch._dynamo.reset()


def network(columns: int, **options: Any) -> Network:
    torch.manual_seed(0)
    sizes = {"channels": (8, 16, 24, 32), "depths": (1, 2, 1, 1), "num_classes": 5}
    return build(**sizes, columns=columns, compile=True, fused="eager", **options)


def step(model: Network, images: int) -> None:
    model(torch.randn(images, 3, 32, 32)).logits[-1].sum().backward()


def test_a_second_shape_needs_more_graphs_than_torch_allows_by_itself(
    graphs: list[int],
) -> None:
    model = network(4, huge=True, stored_columns=2)
    step(model, 2)
    per_shape = len(graphs)
    # Column 0 and later columns, four levels each; some have equal inputs.
    assert per_shape <= compiled_level.GRAPHS_PER_SHAPE
    step(model, 3)
    # PyTorch's own limit is 8, beyond which it runs uncompiled.
    assert 8 < len(graphs) == 2 * per_shape
    step(model, 3)
    assert len(graphs) == 2 * per_shape  # nothing is compiled twice
    step(network(8, huge=True, stored_columns=2), 2)
    assert len(graphs) == 2 * per_shape  # nor for more columns of the same kind


def test_too_many_graphs_are_an_error(graphs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_level, "GRAPHS_PER_SHAPE", 1)
    model = network(2)
    with pytest.raises(TooManyGraphs, match="more than 4 compiled graphs"):
        step(model, 2)
    assert len(graphs) == 4
