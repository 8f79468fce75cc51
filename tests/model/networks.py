"""Small networks for the tests of exact columns, and one training pass through them."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from pipeline.blocks import registry
from pipeline.model import Network, build

KINDS = tuple(registry.facts())
# One kind per level. Every registered kind occurs if there are up to four.
MIXED = tuple(itertools.islice(itertools.cycle(KINDS), 4))
# The same of the kinds without BatchNorm, which amplifies rounding.
WITHOUT_STATISTICS = tuple(
    itertools.islice(
        itertools.cycle(k for k, facts in registry.facts().items() if not facts.running_statistics),
        4,
    )
)

Block = str | tuple[str, ...]


def kinds_of(block: Block) -> tuple[str, ...]:
    return (block,) if isinstance(block, str) else block


def has_running_statistics(block: Block) -> bool:
    return any(registry.facts()[kind].running_statistics for kind in kinds_of(block))


def network_with(alphas: str, **options: Any) -> Network:
    """Build a small network with weights from seed 0.

    ``alphas``: 'initial' weights, or weights as after training with alpha in [0.1, 1] ('trained'),
    in [-2, 2] ('wide') or +-1e-3 ('limit').
    """
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
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Run one training pass -> (outputs, {parameter: gradient})."""
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


def tiny_network(**options: Any) -> Network:
    """Build the smallest network: two columns of 8 channels. ``options``: of ``build``."""
    torch.manual_seed(0)
    return build(
        **{"channels": [8] * 4, "depths": [1] * 4, "columns": 2, "num_classes": 3, **options}
    )


def as_stored(network: Network) -> Network:
    """Build the same network, with the same weights, that stores its activations."""
    stored = build(**{**network.spec.architecture, "activations": "stored"})
    stored.load_state_dict(network.state_dict())
    return stored.train(network.training)


def prediction_sum(network: Any, images: torch.Tensor) -> torch.Tensor:
    """Return a loss that depends on the prediction only."""
    output: torch.Tensor = network(images).logits[-1].square().sum()
    return output


def gradients_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
