"""What the job schema, the checks and the exporter know of a kind of block, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """Facts of one kind of block. Written as literals, so that they can be read without running the file."""

    title: str  # as documents name it
    shortcut: bool = True  # it has one, so that stochastic depth can skip the block
    running_statistics: bool = (
        False  # it has buffers (BatchNorm) that belong to checkpoints and weights
    )
    # Parts of a block's parameter names -> those of the published RevCol code; empty: the published code has no such block.
    published_names: dict[str, str] = field(default_factory=dict)
