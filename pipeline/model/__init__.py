"""Reversible column networks. Imports nothing but torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from pipeline.model.network import Output, RevCol
from pipeline.model.spec import Activations, Four, NetworkSpec

__all__ = ["Activations", "NetworkSpec", "Output", "RevCol", "build"]


def build(
    channels: Sequence[int],
    depths: Sequence[int],
    columns: int,
    num_classes: int,
    huge: bool = False,
    supervised: bool = False,
    block: str = "convnext",
    activations: Activations = "exact",
    drop_path: float = 0.0,
    head_init_scale: float = 1.0,
) -> RevCol:
    """A network from plain numbers; see ``NetworkSpec`` for their meaning."""
    four = cast(Four, tuple(channels)), cast(Four, tuple(depths))
    return RevCol(
        NetworkSpec(*four, columns, num_classes, huge, supervised, block, activations, drop_path, head_init_scale)
    )
