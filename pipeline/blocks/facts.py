"""Facts about a block kind, for the job schema, checks and exporter. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """Facts about one block kind. Written as literals, so they can be read without running code."""

    # The name in documents and messages.
    title: str

    # True if the block adds its input to its output. Stochastic depth (drop_path) needs this: a
    # dropped block passes its input through unchanged.
    shortcut: bool = True

    # True if the block has buffers (BatchNorm) that checkpoints and exported weights must include.
    running_statistics: bool = False

    # Sizes of one block, for the estimates of memory and time (``config/network_sizes.py``). The
    # defaults are those of ConvNeXt; another kind may round generously.
    # Parameters: as a multiple of channels squared, and all others as a multiple of the channels.
    weights: float = 8.0
    vectors: float = 18.0
    # Multiply-adds per value apart from those of the weights: depthwise filters, and whether every
    # position is compared with every other one.
    depthwise: float = 9.0
    attention: bool = False
    # Values per position that autograd keeps for the backward pass, as a multiple of the channels.
    saved: float = 12.0
    # Channels of the widest map inside the block, as a multiple of its own.
    widest: float = 4.0

    # Of the stem and of the layers between levels: biases and norms, as a multiple of the channels;
    # pixels that the layer from a finer level merges; pixels per side that the stem pools.
    layer_vectors: float = 3.0
    down_taps: int = 4
    stem_pooling: int = 1

    # Maps parts of our parameter names to those of the published RevCol code.
    # Empty if the published code has no such block.
    published_names: dict[str, str] = field(default_factory=dict)
