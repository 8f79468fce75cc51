"""Description of a reversible column network in plain numbers."""

from __future__ import annotations

from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, Literal, cast, get_args

from pipeline.blocks import registry

Four = tuple[int, int, int, int]
FourNames = tuple[str, str, str, str]
Activations = Literal["stored", "exact", "checkpointed"]
Fused = Literal["auto", "compiled", "eager"]
Init = Literal["published", "fan_in"]
StemStride = Literal[1, 2, 4]
PUBLISHED_STEM_STRIDE: StemStride = 4


@dataclass(frozen=True)
class NetworkSpec:
    """Architecture of one RevCol (Cai et al., ICLR 2023, section 3) and its way of computing.

    Raises:
        ValueError: the values do not describe a network.
    """

    # Architecture: these decide the parameters' names and shapes.
    # Widths and numbers of blocks of the four levels, finest first.
    channels: Four
    depths: Four
    columns: int
    num_classes: int
    # Wiring of RevCol-H: level 0 also takes level 3 of the previous column.
    huge: bool = False
    _: KW_ONLY
    # Intermediate supervision: four columns get a classifier, and the first three of them a
    # reconstruction decoder. Otherwise one classifier reads the last column.
    supervised: bool = False
    # Block kind, one for all levels or one per level.
    block: str | FourNames = "convnext"
    # Stride of the stem, and so of level 0: 4 for photographs, 1 or 2 for images below 96 pixels.
    stem_stride: StemStride = PUBLISHED_STEM_STRIDE

    # Initial weights (see ``pipeline.model.initialisation``) and initial layer scale of the blocks.
    init: Init = "published"
    layer_scale: float = 1e-6

    # Computation: these do not change the parameters.
    # stored: plain autograd in floating point. checkpointed: the same, but each column is
    # recomputed in the backward pass. exact: fixed-point stream, inverted in the backward pass.
    activations: Activations = "exact"
    # Stochastic-depth rate of the last block of a column. The first block has rate 0.
    drop_path: float = 0.0
    # Factor of the classifiers' initial weights.
    head_init_scale: float = 1.0
    # With exact: this many last columns store their activations. auto: as many as fit the memory.
    stored_columns: int | Literal["auto"] = 0
    # torch.compile of each level's function (not with ZeRO-3).
    compile: bool = False
    # Whether the stream's element-wise kernels are compiled.
    fused: Fused = "auto"
    # Of the stream: resolution 2**-bits, range 2**(31 - bits).
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
        self._check_blocks()
        self._check_initialisation()
        if self.stored_columns and self.activations != "exact":
            raise ValueError(
                f"stored_columns needs activations 'exact', but activations is {self.activations!r}"
            )
        if not 8 <= self.fraction_bits <= 24:
            raise ValueError(f"fraction_bits must be from 8 to 24, got {self.fraction_bits}")

    def _check_blocks(self) -> None:
        kinds = registry.facts()
        unknown = [name for name in self.blocks if name not in kinds]
        if unknown or len(self.blocks) != 4:
            raise ValueError(
                f"block must be one of {sorted(kinds)}, or four of them (one per level), "
                f"got {self.block!r}"
            )
        if self.drop_path and not all(kinds[name].shortcut for name in self.blocks):
            raise ValueError(
                f"drop_path needs blocks with a shortcut, and {self.block!r} has none: set it to 0"
            )

    def _check_initialisation(self) -> None:
        if self.stem_stride not in get_args(StemStride):
            raise ValueError(f"stem_stride must be 1, 2 or 4, got {self.stem_stride}")
        if self.init not in get_args(Init):
            raise ValueError(f"init must be 'published' or 'fan_in', got {self.init!r}")
        if self.layer_scale <= 0:
            raise ValueError(f"layer_scale must be above 0, got {self.layer_scale}")

    @property
    def stride(self) -> int:
        """Stride of level 3 (pixels): classified images have sides that are multiples of it."""
        return 8 * self.stem_stride  # each of the three finer levels is halved once

    @property
    def blocks(self) -> FourNames:
        """Block kind of each level."""
        return cast(
            FourNames, (self.block,) * 4 if isinstance(self.block, str) else tuple(self.block)
        )

    @property
    def supervised_columns(self) -> tuple[int, ...]:
        """Columns (0-based) whose level 3 a classifier reads. The last classifier is the model's.

        Example: 10 columns with intermediate supervision: every 10 // 4 = 2 columns: (1, 3, 5, 7).
        """
        if not self.supervised:
            return (self.columns - 1,)
        interval = self.columns // 4
        return tuple(interval * (i + 1) - 1 for i in range(4))

    @property
    def architecture(self) -> dict[str, Any]:
        """Attributes that decide the parameters' names and shapes. A checkpoint must match them."""
        names = ["channels", "depths", "columns", "num_classes", "huge", "supervised", "block"]
        # Left out where it is the published one: checkpoints of earlier releases do not record it.
        if self.stem_stride != PUBLISHED_STEM_STRIDE:
            names.append("stem_stride")
        return {name: value for name, value in asdict(self).items() if name in names}
