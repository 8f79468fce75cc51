"""Device memory of a training stage, estimated from the sizes of the network.

Arithmetic only: neither torch nor a GPU is needed, so a job that cannot fit is refused before its
data is prepared. Checked against RevCol-H's traced tensors (86 MiB per image at 224 pixels with
nothing stored, 924 MiB with all columns stored) and, for small networks, against live tensors.

Worked example: RevCol-H (2.4 billion parameters) in bf16 under ZeRO 2 on 8 GPUs of 79.1 GiB::

    state          weights 4.5, gradients 1.1, optimizer 3.4, buckets 0.9          10.0 GiB
    an image       224 pixels, all columns stored                                   0.93 GiB
    64 images      10.0 + 64 x 0.93                                                70 GiB
    usable         0.92 x 79.1 - 1.5 (allocator, NCCL, cuBLAS)                     71.3 GiB
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.blocks import registry
from pipeline.blocks.facts import BlockFacts
from pipeline.config.schema import ModelConfig, TrainConfig

GIB = 2.0**30
USABLE_SHARE = 0.92  # of a device: the allocator's blocks never fit exactly
RESERVED_BYTES = 1.5 * GIB  # CUDA context, NCCL, cuBLAS workspaces
# Kernels index a tensor with 32 bits. Beyond that, libraries take other and less tested paths.
MAX_ELEMENTS = 2**31

SIMPLE_DECODER_ABOVE = 1000  # classes; see ``model/heads.py``
SUPERVISED = 4  # columns with a classifier under intermediate supervision; all but one decode
REDUCE_BUCKET = 500_000_000  # elements of DeepSpeed's communication buffer
GATHERED_LEVELS = 5  # that ZeRO-3 holds at once: four live ones and one on its way
REMAINDER_BITS = 2  # per element: 1 at the initial alpha of 0.5, more when alpha shrinks
DECODER_SAVED = 7  # maps that autograd keeps per decoder stage
FUSION_SAVED = 2  # maps that autograd keeps of a level besides its blocks: down and up
INPUT_BYTES = 13  # per pixel and colour: uint8, and three float copies during augmentation


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """What a training stage needs on each device.

    Attributes:
        state: bytes that do not depend on the images: weights, gradients, optimizer, EMA, buffers.
        update: additional bytes of the optimizer's update, when no activations are alive.
        image: bytes of activations per image.
        elements: elements per image of the largest tensor.
    """

    state: float
    update: float
    image: float
    elements: float

    def needed(self, micro_batch: int) -> float:
        """Peak bytes of a step with ``micro_batch`` images."""
        return self.state + max(self.update, micro_batch * self.image)

    def fits(self, micro_batch: int, device_bytes: float) -> bool:
        """Whether a step fits a device, and its tensors 32-bit indexing."""
        return micro_batch * self.elements < MAX_ELEMENTS and self.needed(micro_batch) <= usable(
            device_bytes
        )


def usable(device_bytes: float) -> float:
    """Bytes of a device that tensors can fill."""
    return USABLE_SHARE * device_bytes - RESERVED_BYTES


def stage_memory(
    model: ModelConfig, train: TrainConfig, *, classes: int, world_size: int, stored: int
) -> StageMemory:
    """Estimate a training stage.

    Args:
        classes: outputs of each classifier.
        world_size: processes that share the state, as ``zero_stage`` says.
        stored: columns that store their activations (with activations 'exact').
    """
    network = _Network(model, train, classes)
    count = network.parameters()
    return StageMemory(
        state=_state_bytes(network, count, world_size),
        # Temporaries of AdamW, in fp32 and of the own share: flat gradients and a square root.
        update=8 * count / world_size,
        image=network.image_bytes(stored),
        elements=network.largest_map(),
    )


def _state_bytes(network: _Network, count: float, world_size: int) -> float:
    """Bytes of weights, gradients, optimizer, EMA and communication buffers per device."""
    train = network.train
    stage = train.zero_stage
    width = network.width
    # ZeRO shares out more and more: optimizer (1), gradients (2), weights (3).
    if stage == 3:
        weights = width * (count / world_size + GATHERED_LEVELS * network.largest_level())
    else:
        weights = width * count
    # Shared gradients are accumulated in fp32, unshared ones have the dtype of the network.
    gradients = 4 * count / world_size if stage >= 2 else width * count
    # Two Adam moments; an fp32 copy of the weights, which ZeRO 0 does without; the average.
    optimizer = (8 if stage == 0 else 12) * count
    average = 4 * count if train.ema_decay else 0
    shared = (optimizer + average) / (world_size if stage else 1)
    buffers = width * min(count, REDUCE_BUCKET) * (2 if stage == 3 else 1)
    return weights + gradients + shared + buffers


class _Network:
    """Sizes of a network: parameters, and bytes of its activations."""

    def __init__(self, model: ModelConfig, train: TrainConfig, classes: int) -> None:
        self.model = model
        self.train = train
        self.classes = classes
        self.width = 2 if train.precision == "bf16" else 4  # bytes of a number inside F
        names = (model.block,) * 4 if isinstance(model.block, str) else model.block
        self.kinds: list[BlockFacts] = [registry.facts()[name] for name in names]
        # Positions of each level's map per image: 224 pixels -> 3136, 784, 196, 49.
        self.positions = [(train.image_size / (4 << level)) ** 2 for level in range(4)]

    # Parameters. Vectors (norms, biases, layer scale) are left out: at most a few percent.

    def level_parameters(self, level: int, *, first_column: bool = False) -> float:
        channels = self.model.channels
        own = channels[level]
        count = self.model.depths[level] * self.kinds[level].weights * own**2
        if level > 0:
            count += 4 * channels[level - 1] * own  # convolution 2x2
        if level < 3 and not first_column:
            count += channels[level + 1] * own
        if level == 0 and self.model.huge and not first_column:
            count += channels[3] * own
        return count

    def largest_level(self) -> float:
        return max(self.level_parameters(level) for level in range(4))

    def parameters(self) -> float:
        first = sum(self.level_parameters(level, first_column=True) for level in range(4))
        others = sum(self.level_parameters(level) for level in range(4))
        stem = 48 * self.model.channels[0]
        return stem + first + (self.model.columns - 1) * others + self._head_parameters()

    def _head_parameters(self) -> float:
        c0, c1, c2, c3 = self.model.channels
        if not self.train.intermediate_supervision:
            return self.classes * c3
        if self.classes > SIMPLE_DECODER_ABOVE:
            decoder = 3072 * c3
        else:
            decoder = c3 * c2 + c2 * c1 + c1 * c0 + 2 * (c2**2 + c1**2 + c0**2) + 48 * c0
        return SUPERVISED * self.classes * c3 + (SUPERVISED - 1) * decoder

    # Activations per image.

    def _map(self, level: int) -> float:
        """Elements of a level's map."""
        return self.positions[level] * self.model.channels[level]

    def largest_map(self) -> float:
        """Elements of the largest tensor: a hidden map of a block."""
        return max(self._map(level) * self.kinds[level].widest for level in range(4))

    def _saved(self, level: int) -> float:
        """Bytes that autograd keeps of a level's F."""
        blocks = self.model.depths[level] * self.kinds[level].saved
        return self._map(level) * (blocks + FUSION_SAVED) * self.width

    def _transient(self, level: int) -> float:
        """Bytes that the backward pass of a block adds: gradients of its hidden maps."""
        return self._map(level) * 2 * self.kinds[level].widest * self.width

    def _decoder_bytes(self) -> float:
        """Bytes that reconstructions keep until the loss is differentiated."""
        if not self.train.intermediate_supervision:
            return 0
        # 48 values per position of stride 4, which are 16 pixels: computed, fp32, and its gradient.
        kept = 48 * self.positions[0] * (self.width + 8)
        if self.classes <= SIMPLE_DECODER_ABOVE:
            kept += sum(self._map(level) for level in range(3)) * DECODER_SAVED * self.width
        return (SUPERVISED - 1) * kept

    def image_bytes(self, stored: int) -> float:
        """Peak bytes of activations per image; ``stored`` columns keep theirs."""
        levels = range(4)
        columns = self.model.columns
        maps = 4 * sum(self._map(level) for level in levels)  # of one column, in fp32 or int32
        column = maps + sum(self._saved(level) for level in levels)
        transient = max(self._transient(level) for level in levels)
        stem = 2 * 4 * self._map(0)  # its output and the gradient of it
        inputs = 3 * self.train.image_size**2 * INPUT_BYTES
        # Whatever the columns keep is alive while the heads run, and while the last column is
        # differentiated; then it shrinks.
        late = max(self._decoder_bytes(), maps + transient)
        if self.model.activations == "stored":
            return inputs + stem + columns * column + late
        if self.model.activations == "checkpointed":
            return inputs + stem + columns * maps + column + late
        remainders = max(0, columns - stored - 1) * maps / 4 * REMAINDER_BITS / 8
        storing = stored * column + 2 * maps + late
        # Inversion: the stream, the maps of two columns, their gradients, and the graph of the one
        # level that is being computed again.
        level = max(self._saved(level) + self._transient(level) for level in levels)
        inverting = 4 * maps + level if stored < columns else 0
        return inputs + stem + remainders + max(storing, inverting)
