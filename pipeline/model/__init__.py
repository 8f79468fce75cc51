"""Reversible column networks. Imports nothing but torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

from pipeline.model.network import Network, Output, RevCol
from pipeline.model.spec import Activations, Four, Fused, NetworkSpec

__all__ = ["Activations", "Network", "NetworkSpec", "Output", "RevCol", "build"]


def build(
    channels: Sequence[int],
    depths: Sequence[int],
    columns: int,
    num_classes: int,
    huge: bool = False,
    supervised: bool = False,
    block: str | Sequence[str] = "convnext",
    activations: Activations = "exact",
    drop_path: float = 0.0,
    head_init_scale: float = 1.0,
    stored_columns: int | Literal["auto"] = 0,
    compile: bool = False,
    fused: Fused = "auto",
    fraction_bits: int = 18,
) -> Network:
    """A network from plain numbers; see ``NetworkSpec`` for their meaning."""
    kinds = block if isinstance(block, str) else cast(tuple[str, str, str, str], tuple(block))
    return Network(
        NetworkSpec(
            cast(Four, tuple(channels)),
            cast(Four, tuple(depths)),
            columns,
            num_classes,
            huge,
            supervised,
            kinds,
            activations,
            drop_path,
            head_init_scale,
            stored_columns,
            compile,
            fused,
            fraction_bits,
        )
    )
