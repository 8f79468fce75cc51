"""Sizes that follow from a job, compared with the network that torch builds."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.network_sizes import NetworkSizes
from pipeline.config.schema import ModelConfig
from pipeline.model import Network, build

CHANNELS = (16, 32, 48, 64)
DEPTHS = (1, 2, 3, 1)


def network_and_sizes(
    block: str, stem_stride: int, classes: int, *, supervised: bool, huge: bool
) -> tuple[Network, NetworkSizes]:
    network = build(
        CHANNELS,
        DEPTHS,
        5,
        classes,
        huge=huge,
        supervised=supervised,
        block=block,
        stem_stride=stem_stride,
        activations="stored",
    )
    model = ModelConfig(
        channels=CHANNELS,
        depths=DEPTHS,
        columns=5,
        huge=huge,
        block=block,
        stem_stride=stem_stride,
    )
    return network, NetworkSizes(model, image_size=64, classes=classes, supervised=supervised)


@pytest.mark.parametrize(
    ("block", "stem_stride", "classes", "supervised", "huge"),
    [
        ("convnext", 4, 10, True, True),
        ("convnext", 2, 1500, True, False),
        ("c2f", 4, 10, False, False),
        ("residual", 4, 10, True, False),
        ("residual", 1, 10, False, False),
        ("transformer", 4, 10, False, True),
    ],
)
def test_parameters_and_arithmetic_are_those_of_the_network(
    block: str, stem_stride: int, classes: int, supervised: bool, huge: bool
) -> None:
    network, sizes = network_and_sizes(
        block, stem_stride, classes, supervised=supervised, huge=huge
    )
    assert sizes.parameters == sum(value.numel() for value in network.parameters())
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    assert sizes.running_statistics == sum(buffer.numel() for buffer in buffers)
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 64, 64))
    counted = counter.get_total_flops() / 2
    if block == "transformer":  # torch does not count the attention of a CPU
        attention = sum(
            5 * depth * 2 * positions**2 * channels
            for depth, positions, channels in zip(DEPTHS, sizes.positions, CHANNELS, strict=True)
        )
        counted += attention
    assert sizes.macs() == counted
