"""Depth of every parameter for layer-wise learning-rate decay (the published rule), and which ones decay."""

from __future__ import annotations

import re

from pipeline.model.spec import NetworkSpec

_LEVEL = re.compile(
    r"columns\.(\d+)\.levels\.(\d)\.(?:(alpha)|(?:blocks\.(\d+))|(?:down|up|up_top))"
)


def num_layers(spec: NetworkSpec) -> int:
    """Depth of the heads: blocks of one column plus columns."""
    return sum(spec.depths) + spec.columns


def layer_id(name: str, spec: NetworkSpec) -> int:
    """0 for the stem, ``num_layers`` for the heads; block b of column t (counted through its levels) has b + t + 1, a
    level's fusion the id of its first block, alpha t + 1."""
    if name.startswith("stem."):
        return 0
    match = _LEVEL.match(name)
    if match is None:
        return num_layers(spec)
    column, level = int(match[1]), int(match[2])
    if match[3]:
        return column + 1
    return sum(spec.depths[:level]) + int(match[4] or 0) + column + 1


def is_alpha(name: str) -> bool:
    """Whether the parameter is a column's residual scale."""
    return name.endswith(".alpha")


def decays(name: str, dimensions: int, decay_alpha: bool) -> bool:
    """Whether weight decay applies: not to 1-D parameters, but to alpha (4-D in the published code) if told so."""
    return decay_alpha if is_alpha(name) else dimensions > 1
