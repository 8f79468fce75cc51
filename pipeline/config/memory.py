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

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.network_sizes import LEVELS, SIMPLE_DECODER_ABOVE, SUPERVISED, NetworkSizes
from pipeline.config.schema import ModelConfig, TrainConfig
from pipeline.optimizers import registry as optimizers

GIB = 2.0**30
USABLE_SHARE = 0.92  # of a device: the allocator's blocks never fit exactly
RESERVED_BYTES = 1.5 * GIB  # CUDA context, NCCL, cuBLAS workspaces
# Kernels index a tensor with 32 bits. Beyond that, libraries take other and less tested paths.
MAX_ELEMENTS = 2**31

REDUCE_BUCKET = 500_000_000  # elements of DeepSpeed's communication buffer
GATHERED_LEVELS = 5  # that ZeRO-3 holds at once: four live ones and one on its way
REMAINDER_BITS = 2  # per element: 1 at the initial alpha of 0.5, more when alpha shrinks
DECODER_SAVED = 7  # maps that autograd keeps per decoder stage
FUSION_SAVED = 2  # maps that autograd keeps of a level besides its blocks: down and up
INPUT_BYTES = 13  # per pixel and colour: uint8, and three float copies during augmentation

# Parts of the state, and of the activations of an image.
WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE, BUFFERS = (
    "weights",
    "gradients",
    "optimizer",
    "average",
    "buffers",
)
INPUTS, MAPS, REMAINDERS = ("inputs", "activations", "remainders")


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """What a training stage needs on each device.

    Attributes:
        state_parts: bytes that do not depend on the images, by part.
        update: additional bytes of the optimizer's update, when no activations are alive.
        image_parts: bytes per image at the peak of a step, by part.
        elements: elements per image of the largest tensor.
    """

    state_parts: Mapping[str, float]
    update: float
    image_parts: Mapping[str, float]
    elements: float

    @property
    def state(self) -> float:
        """Bytes that do not depend on the images: weights, gradients, optimizer, EMA, buffers."""
        return sum(self.state_parts.values())

    @property
    def image(self) -> float:
        """Bytes of activations per image."""
        return sum(self.image_parts.values())

    def needed(self, micro_batch: int) -> float:
        """Peak bytes of a step with ``micro_batch`` images."""
        return self.state + max(self.update, micro_batch * self.image)

    def in_words(self) -> str:
        """What it consists of, for messages."""
        return (
            f"{self.state / GIB:.1f} GiB of weights, gradients and optimizer, and "
            f"{self.image / GIB:.2f} GiB per image or {self.update / GIB:.1f} GiB for the update"
        )

    def fits(self, micro_batch: int, device_bytes: float) -> bool:
        """Whether a step fits a device, and its tensors 32-bit indexing."""
        return micro_batch * self.elements < MAX_ELEMENTS and self.needed(micro_batch) <= usable(
            device_bytes
        )


def usable(device_bytes: float) -> float:
    """Bytes of a device that tensors can fill."""
    return USABLE_SHARE * device_bytes - RESERVED_BYTES


def network_sizes(model: ModelConfig, train: TrainConfig, classes: int) -> NetworkSizes:
    """The sizes of the network that a stage trains."""
    return NetworkSizes(
        model,
        image_size=train.image_size,
        classes=classes,
        supervised=train.intermediate_supervision,
    )


def stage_memory(
    model: ModelConfig, train: TrainConfig, *, classes: int, world_size: int, stored: int
) -> StageMemory:
    """Estimate a training stage.

    Args:
        classes: outputs of each classifier.
        world_size: processes that share the state, as ``zero_stage`` says.
        stored: columns that store their activations (with activations 'exact').
    """
    sizes = network_sizes(model, train, classes)
    own = sizes.parameters / (world_size if train.zero_stage else 1)
    return StageMemory(
        state_parts=_state_parts(sizes, train, world_size),
        # Temporaries of AdamW, in fp32 and of the own share: flat gradients and a square root.
        update=0.0 if _is_offloaded(train) else 8 * own,
        image_parts=_ImageMemory(sizes, train).parts(stored),
        elements=sizes.largest_map(),
    )


def checkpoint_bytes(sizes: NetworkSizes, train: TrainConfig) -> float:
    """Bytes of a checkpoint: fp32 weights and moments, with the EMA and the best weights."""
    copies = bool(train.ema_decay) + (train.keep == "best")
    weights = 1 + _moments(train) + copies
    return 4 * (weights * sizes.parameters + (1 + copies) * sizes.running_statistics)


def _state_parts(sizes: NetworkSizes, train: TrainConfig, world_size: int) -> dict[str, float]:
    """Bytes of weights, gradients, optimizer, EMA and communication buffers per device."""
    stage = train.zero_stage
    width = _width(train)
    count = sizes.parameters
    shared_by = world_size if stage else 1
    on_device = not _is_offloaded(train)
    # ZeRO shares out more and more: optimizer (1), gradients (2), weights (3).
    if stage == 3:
        weights = width * (count / world_size + GATHERED_LEVELS * sizes.largest_level())
    else:
        weights = width * count
    return {
        WEIGHTS: weights,
        # Shared gradients are accumulated in fp32, unshared ones have the dtype of the network.
        GRADIENTS: 4 * count / world_size if stage >= 2 else width * count,
        # The moments, and an fp32 copy of the weights, which ZeRO 0 does without.
        OPTIMIZER: 4 * (_moments(train) + (stage > 0)) * count / shared_by * on_device,
        AVERAGE: 4 * count / shared_by * on_device if train.ema_decay else 0.0,
        BUFFERS: width * min(count, REDUCE_BUCKET) * (2 if stage == 3 else 1),
    }


def _is_offloaded(train: TrainConfig) -> bool:
    """Whether the host's memory or a disk has what the optimizer keeps, and the average."""
    return train.offload_optimizer != "none"


def _width(train: TrainConfig) -> int:
    """Bytes of a number inside F."""
    return 4 if train.precision == "fp32" else 2


def _moments(train: TrainConfig) -> int:
    """Values per weight in the optimizer's state: two for AdamW."""
    return len(optimizers.facts()[train.optimizer].moments)


class _ImageMemory:
    """Bytes per image of a network's activations."""

    def __init__(self, sizes: NetworkSizes, train: TrainConfig) -> None:
        self.sizes = sizes
        self.model = sizes.model
        self.width = _width(train)

    def parts(self, stored: int) -> dict[str, float]:
        """Peak bytes per image, by part; ``stored`` columns keep their activations."""
        columns = self.model.columns
        maps = 4 * sum(self.sizes.map(level) for level in LEVELS)  # of one column, fp32 or int32
        column = maps + sum(self._saved(level) for level in LEVELS)
        transient = max(self._transient(level) for level in LEVELS)
        stem = 2 * 4 * self.sizes.map(0)  # its output and the gradient of it
        # Whatever the columns keep is alive while the heads run, and while the last column is
        # differentiated; then it shrinks.
        late = max(self._decoder_bytes(), maps + transient)
        remainders = 0.0
        if self.model.activations == "stored":
            kept = columns * column + late
        elif self.model.activations == "checkpointed":
            kept = columns * maps + column + late
        else:
            remainders = max(0, columns - stored - 1) * maps / 4 * REMAINDER_BITS / 8
            storing = stored * column + 2 * maps + late
            # Inversion: the stream, the maps of two columns, their gradients, and the graph of the
            # one level that is being computed again.
            level = max(self._saved(level) + self._transient(level) for level in LEVELS)
            kept = max(storing, 4 * maps + level if stored < columns else 0)
        inputs = 3 * self.sizes.image_size**2 * INPUT_BYTES
        return {INPUTS: inputs, MAPS: stem + kept, REMAINDERS: remainders}

    def _saved(self, level: int) -> float:
        """Bytes that autograd keeps of a level's F."""
        blocks = self.model.depths[level] * self.sizes.kinds[level].saved
        return self.sizes.map(level) * (blocks + FUSION_SAVED) * self.width

    def _transient(self, level: int) -> float:
        """Bytes that the backward pass of a block adds: gradients of its hidden maps."""
        return self.sizes.map(level) * 2 * self.sizes.kinds[level].widest * self.width

    def _decoder_bytes(self) -> float:
        """Bytes that reconstructions keep until the loss is differentiated."""
        if not self.sizes.supervised:
            return 0
        # The pixels of the reconstruction: computed, in fp32, and their gradient.
        kept = 3.0 * self.sizes.image_size**2 * (self.width + 8)
        if self.sizes.classes <= SIMPLE_DECODER_ABOVE:
            kept += sum(self.sizes.map(level) for level in range(3)) * DECODER_SAVED * self.width
        return (SUPERVISED - 1) * kept
