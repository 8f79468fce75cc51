"""Reversible column networks. Imports only torch and the block kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict, Unpack, overload

from pipeline.model.network import Network, Output, RevCol
from pipeline.model.sizes import models, size_of
from pipeline.model.spec import Activations, Fused, Init, NetworkSpec, StemStride

__all__ = ["Activations", "Network", "NetworkSpec", "Output", "RevCol", "build", "models"]


class NetworkSettings(TypedDict, total=False):
    """Optional arguments of ``build``. See ``NetworkSpec`` for their meaning and defaults."""

    huge: bool
    supervised: bool
    block: str | Sequence[str]
    stem_stride: StemStride
    init: Init
    layer_scale: float
    activations: Activations
    drop_path: float
    head_init_scale: float
    stored_columns: int | Literal["auto"]
    compile: bool
    fused: Fused
    fraction_bits: int


@overload
def build(
    model: str, /, *, num_classes: int = 1000, **settings: Unpack[NetworkSettings]
) -> Network: ...


@overload
def build(
    channels: Sequence[int],
    depths: Sequence[int],
    columns: int,
    num_classes: int,
    **settings: Unpack[NetworkSettings],
) -> Network: ...


def build(
    channels: str | Sequence[int],
    depths: Sequence[int] = (),
    columns: int = 0,
    num_classes: int = 1000,
    **settings: Unpack[NetworkSettings],
) -> Network:
    """Build a network from the name of its size (``models``), or from plain numbers.

        build("revcol_tiny", num_classes=10)
        build(channels=[16, 32, 64, 128], depths=[1, 1, 2, 1], columns=4, num_classes=10)

    See ``NetworkSpec`` for the other arguments. They win over those that a name stands for.

    Raises:
        ValueError: no model has this name, or the values do not describe a network.
        TypeError: a name and further positional arguments.
    """
    values: dict[str, object] = {"channels": channels, "depths": depths, "columns": columns}
    if isinstance(channels, str):
        if depths or columns:
            raise TypeError(f"write build({channels!r}, num_classes=...): a name has its own sizes")
        values = dict(size_of(channels))
    values |= {"num_classes": num_classes, **settings}
    # The fields of a NetworkSpec are tuples: it cannot change.
    for key in ("channels", "depths", "block"):
        value = values.get(key)
        if isinstance(value, Sequence) and not isinstance(value, str):
            values[key] = tuple(value)
    return Network(NetworkSpec(**values))  # type: ignore[arg-type]
