"""Exact columns under PyTorch's own wrappers for several processes, and under AMP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.model import Network
from tests.model.networks import gradients_of, prediction_sum, tiny_network
from tests.train.processes import run

Gradients = dict[str, Tensor]


# The functions of a rank leave their process group alive: its destructor can wait for a thread that
# waits for Python's lock, which the destructor holds. The process ends at once anyway.


def rank_images(rank: int) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rank))


def mean_gradients(network: Network) -> Gradients:
    """Gradients of the mean loss of both ranks, in this process."""
    for rank in range(2):
        (prediction_sum(network, rank_images(rank)) / 2).backward()  # type: ignore[no-untyped-call]
    return gradients_of(network)


def ddp_gradients(options: dict[str, Any]) -> tuple[Gradients, list[str]]:
    """Two passes under DistributedDataParallel: the second finds the hooks of the first."""
    dist.init_process_group("gloo")
    network = tiny_network()
    wrapped = DistributedDataParallel(network, **options)
    for _ in range(2):
        network.zero_grad()
        prediction_sum(wrapped, rank_images(dist.get_rank())).backward()  # type: ignore[no-untyped-call]
    gradients = gradients_of(network)
    return gradients, network.consistency.report()


def fsdp_gradients() -> tuple[Gradients, list[str]]:
    """Whole gradients under FSDP2, each level and the rest sharded."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    network = tiny_network()
    for column in network.columns:
        for level in column.levels:  # type: ignore[union-attr]
            fully_shard(level)  # type: ignore[call-overload]
    fully_shard(network)
    for _ in range(2):
        network.zero_grad()
        prediction_sum(network, rank_images(dist.get_rank())).backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: parameter.grad.full_tensor()  # type: ignore[attr-defined]
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }
    report = network.consistency.report()
    return gradients, report


def assert_same(results: list[Any]) -> None:
    expected = mean_gradients(tiny_network())
    for gradients, report in results:
        assert report == []
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(
    "options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str
)
def test_ddp_averages_the_gradients(options: dict[str, Any], tmp_path: Path) -> None:
    assert_same(run(tmp_path, 2, ddp_gradients, options))


def test_fsdp2_averages_the_gradients(tmp_path: Path) -> None:
    assert_same(run(tmp_path, 2, fsdp_gradients))
