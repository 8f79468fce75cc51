"""What a reversible column network looks like, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from pipeline.blocks import registry

Four = tuple[int, int, int, int]
FourNames = tuple[str, str, str, str]
Activations = Literal["stored", "exact", "checkpointed"]
Fused = Literal["auto", "compiled", "eager"]


@dataclass(frozen=True)
class NetworkSpec:
    """One RevCol (Cai et al., ICLR 2023, section 3) and how it computes.

    ``channels`` and ``depths`` are those of the four levels, finest (stride 4) first; ``block`` names their kind of blocks,
    one for all or one a level. ``supervised`` puts a classifier on four columns and a reconstruction decoder on the first
    three of them; otherwise one classifier reads the last column.

    The rest changes nothing in the parameters. ``activations``: 'stored' (plain autograd, plain floating point),
    'checkpointed' (the same, a column at a time recomputed), 'exact' (fixed-point stream, inverted in the backward pass);
    'exact' can keep the graphs of the last ``stored_columns``, 'auto' those that fit the device's memory. ``compile``:
    torch.compile of each level's function (not under ZeRO-3). ``fused``: the stream's element-wise passes as compiled ones.
    ``fraction_bits``: resolution 2**-bits and range 2**(31 - bits) of the stream.
    """

    channels: Four
    depths: Four
    columns: int
    num_classes: int
    huge: bool = False
    supervised: bool = False
    block: str | FourNames = "convnext"
    activations: Activations = "exact"
    drop_path: float = 0.0
    head_init_scale: float = 1.0
    stored_columns: int | Literal["auto"] = 0
    compile: bool = False
    fused: Fused = "auto"
    fraction_bits: int = 18

    def __post_init__(self) -> None:
        if len(self.channels) != 4 or len(self.depths) != 4:
            raise ValueError(
                f"channels and depths need four levels each, got {self.channels} and {self.depths}"
            )
        if self.supervised and self.columns < 4:
            raise ValueError(
                f"intermediate supervision needs at least 4 columns, got {self.columns}"
            )
        kinds = registry.facts()
        unknown = [name for name in self.blocks if name not in kinds]
        if unknown or len(self.blocks) != 4:
            raise ValueError(
                f"block must be one of {sorted(kinds)}, or four of them (one a level), got {self.block!r}"
            )
        if self.drop_path and not all(kinds[name].shortcut for name in self.blocks):
            raise ValueError(
                f"drop_path needs blocks with a shortcut, and {self.block!r} has none: set it to 0"
            )
        if self.stored_columns and self.activations != "exact":
            raise ValueError(
                f"stored_columns belongs to activations 'exact', not {self.activations!r}"
            )
        if not 8 <= self.fraction_bits <= 24:
            raise ValueError(f"fraction_bits must be from 8 to 24, got {self.fraction_bits}")

    @property
    def blocks(self) -> FourNames:
        """Kind of blocks of each level."""
        return cast(
            FourNames, (self.block,) * 4 if isinstance(self.block, str) else tuple(self.block)
        )

    @property
    def supervised_columns(self) -> tuple[int, ...]:
        """Columns (0-based) whose level 3 is read by a classifier, the last one being the model's."""
        if not self.supervised:
            return (self.columns - 1,)
        interval = self.columns // 4
        return tuple(interval * (i + 1) - 1 for i in range(4))

    @property
    def architecture(self) -> dict[str, Any]:
        """What decides the parameters' names and shapes (what a checkpoint must agree with)."""
        names = ("channels", "depths", "columns", "num_classes", "huge", "supervised", "block")
        return {name: value for name, value in asdict(self).items() if name in names}
