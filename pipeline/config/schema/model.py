"""The job's ``model`` section: the network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.blocks import registry
from pipeline.config.schema.rules import NOTHING, TRAINING_RESULTS, Rules
from pipeline.config.schema.section import Section, known_name
from pipeline.config.schema.shrink import fixed, narrow

# The names come from the registry, so that a new kind of block is one new file and no edit here.
_KINDS = list(registry.facts())
Block = Annotated[str, known_name(_KINDS), Field(json_schema_extra={"enum": list(_KINDS)})]
StemStride = Literal[1, 2, 4]
Levels = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]


class ModelConfig(Section):
    """A reversible column network (Cai et al., ICLR 2023)."""

    channels: Annotated[Levels, Rules(rehearse=narrow)] = Field(
        description="Widths C0..C3 of the four levels (channels), finest level first."
    )
    depths: Levels = Field(description="Number of blocks at each of the four levels of a column.")
    columns: PositiveInt = Field(description="Number of columns T.")
    huge: bool = Field(
        False,
        description="RevCol-H wiring: level 0 also receives level 3 of the previous column.",
    )
    block: Block | tuple[Block, Block, Block, Block] = Field(
        "convnext",
        description="Kind of block: one name for all levels, or a list of four, one per level.",
    )
    stem_stride: StemStride = Field(
        4,
        description="Stride of the stem (pixels): 4, as published; 1 or 2 for small images, such "
        "as 32 pixels, which then need not be enlarged. Image sizes are multiples of 8 times it.",
    )
    init: Annotated[Literal["published", "fan_in"], Rules(changes=TRAINING_RESULTS)] = Field(
        "published",
        description="Initial weights. 'published': truncated normal of std 0.02, for wide "
        "networks. 'fan_in': normal of std 1 / sqrt(inputs), for narrow ones.",
    )
    layer_scale: Annotated[PositiveFloat, Rules(changes=TRAINING_RESULTS)] = Field(
        1e-6,
        description="Initial layer scale of the blocks. 1 for narrow networks and short training. "
        "Blocks with BatchNorm (c2f, residual) have none.",
    )
    # What only training computes: evaluation and export run without drop path and in plain
    # floating point.
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0), Rules(changes=TRAINING_RESULTS)] = Field(
        0.0,
        description="Stochastic depth rate of the last block of a column. The rates of earlier "
        "blocks increase linearly from 0.",
    )
    # How the backward pass obtains its activations changes memory and time, never the gradients.
    activations: Annotated[
        Literal["exact", "stored", "checkpointed"],
        Rules(changes=NOTHING),
    ] = Field(
        "exact",
        description="How the backward pass obtains activations. 'exact': inverts the columns bit "
        "for bit (memory does not grow with the number of columns). 'stored': keeps all of them "
        "(plain autograd). 'checkpointed': keeps the feature maps of each column and recomputes "
        "the rest.",
    )
    stored_columns: Annotated[NonNegativeInt | Literal["auto"], Rules(changes=NOTHING)] = Field(
        0,
        description="With activations 'exact': number of last columns that keep their autograd "
        "graph (faster, more memory). 'auto': as many as fit into the device's memory.",
    )
    # Compilation changes speed and the last bits of a sum, as another GPU does.
    # Not rehearsed: the CPU's compiler would take minutes and say nothing about that of a GPU.
    compile: Annotated[bool, Rules(changes=NOTHING, rehearse=fixed(False))] = Field(
        False,
        description="Use torch.compile for each level. Compilation takes a minute or more at the "
        "start; steps on a GPU are faster afterwards.",
    )
    # Example for 18 bits: steps of 2^-18 = 3.8e-6 and a range of +-2^13 = 8192.
    fraction_bits: Annotated[int, Field(ge=8, le=24), Rules(changes=TRAINING_RESULTS)] = Field(
        18,
        description="With activations 'exact': fraction bits of the fixed-point residual stream. "
        "Its resolution is 2^-bits and its range is 2^(31-bits).",
    )

    @property
    def stride(self) -> int:
        """Stride of the coarsest level (pixels): sides of images are multiples of it."""
        return 8 * self.stem_stride
