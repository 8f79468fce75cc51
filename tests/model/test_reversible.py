"""The reversible backward pass against stored activations of the same network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.model import Network, build


def pair(**options: Any) -> tuple[Network, Network]:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"channels": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "columns": 8, "num_classes": 5, **options}
    exact = build(**arguments, activations="exact")
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(-0.5, 0.5)
            if name.endswith("alpha"):
                parameter.uniform_(0.2, 1.1).mul_(torch.where(torch.rand_like(parameter) < 0.3, -1.0, 1.0))
    stored = build(**arguments, activations="stored")
    stored.load_state_dict(exact.state_dict())
    return exact, stored


def gradients(model: Network, images: torch.Tensor, uniforms: torch.Tensor | None = None) -> torch.Tensor:
    out = model(images, uniforms)
    sum((logits**2).sum() for logits in out.logits).backward()  # type: ignore[union-attr]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("supervised", [False, True])
def test_gradients_equal_stored_ones(huge: bool, supervised: bool) -> None:
    exact, stored = pair(huge=huge, supervised=supervised)
    images = torch.randn(3, 3, 64, 96)
    a, b = gradients(exact, images), gradients(stored, images)
    assert float((a - b).norm() / b.norm()) < 2e-3  # the stream's resolution, after 8 columns
    assert int(exact.health.mismatched_elements) == 0


def test_every_parameter_gets_a_gradient_and_the_first_alpha_a_zero_one() -> None:
    exact, _ = pair()
    gradients(exact, torch.randn(2, 3, 32, 32))
    assert all(parameter.grad is not None for parameter in exact.parameters())
    assert all(not p.grad.any() for n, p in exact.named_parameters() if n.startswith("columns.0.") and n.endswith("alpha"))


def test_the_same_numbers_give_the_same_stochastic_depth_and_exact_reversal() -> None:
    exact, _ = pair(drop_path=0.5)
    images, uniforms = torch.randn(4, 3, 32, 32), torch.rand(4, exact.uniforms)
    first = gradients(exact, images, uniforms)
    exact.zero_grad()
    assert torch.equal(first, gradients(exact, images, uniforms))
    assert int(exact.health.mismatched_elements) == 0
    exact.zero_grad()
    assert not torch.equal(first, gradients(exact, images, 1 - uniforms))


def test_a_disturbed_recompute_is_counted() -> None:
    exact, _ = pair()
    out = exact(torch.randn(2, 3, 32, 32))
    with torch.no_grad():
        exact.get_parameter("columns.0.levels.2.blocks.0.project.weight").add_(0.01)
    out.logits[-1].sum().backward()
    assert int(exact.health.mismatched_elements) > 0


@pytest.mark.parametrize("size", [(96, 64), (72, 104)])
def test_sizes_that_are_no_multiple_of_32(size: tuple[int, int]) -> None:
    exact, stored = pair(huge=True)
    images = torch.randn(2, 3, *size)
    maps = exact.features(images)
    assert [tuple(m.shape[1:3]) for m in maps] == [(size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]
    for a, b in zip(maps, stored.features(images), strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def test_activation_memory_does_not_grow_with_columns_as_stored_does() -> None:
    def kept(columns: int, activations: Any) -> int:
        model = build([16, 32, 48, 64], [1, 1, 1, 1], columns, 5, activations=activations)
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(torch.randn(2, 3, 64, 64))
        function = out.logits[0].grad_fn
        assert function is not None
        return sum(seen.values()) - sum(p.untyped_storage().nbytes() for p in model.parameters())

    stored = kept(12, "stored") - kept(4, "stored")
    exact = kept(12, "exact") - kept(4, "exact")
    assert exact < 0.02 * stored
