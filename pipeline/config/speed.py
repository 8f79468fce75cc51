"""Time of a training step, estimated from arithmetic, memory traffic, launches and collectives.

    micro-batch   the larger of the device's time, products / speed + bytes / bandwidth, and of the
                  host's, which launches the kernels
    step          micro-batches + collectives + update

Worked example: RevCol-H, 64 images of 224 pixels on an H100, all columns stored::

    products   64 x 1.86 TFLOP at 589 TFLOP/s                                         0.20 s
    bytes      2.17e9 block elements x 240 and 1.08e9 level elements x 148, at 3 TB/s 0.23 s
    host       8 columns x (11 blocks + 4 levels) x 2.9 ms = 0.35 s: hidden           0.43 s
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.devices import DeviceFacts
from pipeline.config.network_sizes import LEVELS, NetworkSizes
from pipeline.config.schema import TrainConfig

# Bytes that element-wise kernels read and write per element of a map, in bf16. Of a block: F, its
# gradient, and what its products read and write; of a level: the stream. Compiled blocks save some.
BLOCK_BYTES = 240
COMPILED_BLOCK_BYTES = 200
LEVEL_BYTES = 148
RECOMPUTED_SHARE = 0.37  # of a block's bytes: its forward pass
DECODED_BYTES = 54  # of a level: its inversion
RECOMPUTED_LAUNCHES = 0.41  # of those of a stored column
UPDATE_BYTES = 30  # per parameter: gradient, fp32 weight and two moments, read and written; copy


@dataclass(frozen=True, kw_only=True)
class ImageWork:
    """Arithmetic and traffic of a forward and backward pass, per image.

    Attributes:
        model_flops: two operations per multiply-add, three passes: the usual count for MFU.
        executed_flops: with what is computed again: the count for HFU.
        bytes: read and written by element-wise kernels.
        launches: blocks and levels that the host launches, per micro-batch and not per image.
    """

    model_flops: float
    executed_flops: float
    bytes: float
    launches: float


def image_work(sizes: NetworkSizes, precision: str, stored: int) -> ImageWork:
    """The work of a network whose last ``stored`` columns keep their activations."""
    model = sizes.model
    repeats = {"stored": 0.0, "checkpointed": 1.0, "exact": 1 - stored / model.columns}
    repeated = repeats[model.activations]
    # Forward, and backward to inputs and to weights: three passes of two operations each.
    flops = 6 * sizes.macs()
    blocks = model.columns * sum(model.depths[level] * sizes.map(level) for level in LEVELS)
    levels = model.columns * sum(sizes.map(level) for level in LEVELS)
    block_bytes = COMPILED_BLOCK_BYTES if model.compile else BLOCK_BYTES
    traffic = blocks * block_bytes * (1 + repeated * RECOMPUTED_SHARE)
    traffic += levels * (LEVEL_BYTES + repeated * DECODED_BYTES)
    # A level launches about as much as a block: fusion, quantisation, residual.
    units = model.columns * (sum(model.depths) + len(LEVELS))
    return ImageWork(
        model_flops=flops,
        executed_flops=flops + 2 * repeated * sizes.column_macs(),
        bytes=traffic * (2 if precision == "fp32" else 1),
        launches=units * (1 + repeated * RECOMPUTED_LAUNCHES),
    )


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """Seconds of an optimizer step, by cause, and the bytes that each device sends."""

    passes: float
    collectives: float
    update: float
    traffic: float

    @property
    def seconds(self) -> float:
        return self.passes + self.collectives + self.update


def step_time(
    work: ImageWork,
    sizes: NetworkSizes,
    train: TrainConfig,
    *,
    device: DeviceFacts,
    world_size: int,
    micro_batch: int,
) -> StepEstimate:
    """The time of one optimizer step on ``world_size`` devices."""
    accumulation = train.global_batch // (world_size * micro_batch)
    products = work.executed_flops / (device.reached * device.peak[train.precision])
    on_device = micro_batch * (products + work.bytes / device.copy)
    # Kernels run while the host launches the next ones: the slower of both decides.
    on_host = work.launches * device.launch
    traffic = step_traffic(sizes.parameters, train, world_size, accumulation)
    # Once more than one machine takes part, the links between machines are the bottleneck.
    link = device.near if world_size <= device.group else device.far
    share = world_size if train.zero_stage else 1
    return StepEstimate(
        passes=accumulation * max(on_device, on_host),
        collectives=traffic / link,
        update=UPDATE_BYTES * sizes.parameters / share / device.copy,
        traffic=traffic,
    )


def step_traffic(
    parameters: float, train: TrainConfig, world_size: int, accumulation: int
) -> float:
    """Bytes that each device sends in a step.

    ZeRO 0 and 1 reduce the gradients once per step, ZeRO 2 after every micro-batch; then the new
    weights travel once. ZeRO 3 also gathers the weights of every pass, forward and backward.
    """
    if world_size == 1:
        return 0.0
    passes = {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}
    return passes[train.zero_stage] * parameters * (4 if train.precision == "fp32" else 2)
