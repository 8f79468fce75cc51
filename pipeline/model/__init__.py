"""Reversible column networks. Imports only torch and the block kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

from pipeline.model.network import Network, Output, RevCol
from pipeline.model.spec import Activations, Four, Fused, Init, NetworkSpec, StemStride

__all__ = ["Activations", "Network", "NetworkSpec", "Output", "RevCol", "build"]


def build(
    channels: Sequence[int],
    depths: Sequence[int],
    columns: int,
    num_classes: int,
    *,
    huge: bool = False,
    supervised: bool = False,
    block: str | Sequence[str] = "convnext",
    stem_stride: StemStride = 4,
    init: Init = "published",
    layer_scale: float = 1e-6,
    activations: Activations = "exact",
    drop_path: float = 0.0,
    head_init_scale: float = 1.0,
    stored_columns: int | Literal["auto"] = 0,
    compile: bool = False,
    fused: Fused = "auto",
    fraction_bits: int = 18,
) -> Network:
    """Build a network from plain numbers. See ``NetworkSpec`` for the arguments and errors."""
    kinds = block if isinstance(block, str) else cast(tuple[str, str, str, str], tuple(block))
    spec = NetworkSpec(
        channels=cast(Four, tuple(channels)),
        depths=cast(Four, tuple(depths)),
        columns=columns,
        num_classes=num_classes,
        huge=huge,
        supervised=supervised,
        block=kinds,
        stem_stride=stem_stride,
        init=init,
        layer_scale=layer_scale,
        activations=activations,
        drop_path=drop_path,
        head_init_scale=head_init_scale,
        stored_columns=stored_columns,
        compile=compile,
        fused=fused,
        fraction_bits=fraction_bits,
    )
    return Network(spec)
