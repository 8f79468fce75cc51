"""Per-parameter rules of the optimizer: depth for layer-wise learning-rate decay, weight decay."""

from __future__ import annotations

import re

from pipeline.model.spec import NetworkSpec

# Groups: column, level, "alpha", block. The last two are None for down, up and up_top.
_LEVEL = re.compile(
    r"columns\.(\d+)\.levels\.(\d)\.(?:(alpha)|(?:blocks\.(\d+))|(?:down|up|up_top))"
)


def num_layers(spec: NetworkSpec) -> int:
    """Return the depth of the heads: blocks of one column plus number of columns."""
    return sum(spec.depths) + spec.columns


def layer_id(name: str, spec: NetworkSpec) -> int:
    """Return a parameter's depth by the published rule.

    The stem has 0, the heads ``num_layers``, alpha of column t has t + 1, and block b of column t
    (counted through its levels) has b + t + 1. A level's down and up modules have the depth of its
    first block.

    Example: depths 1 2 6 2, column 3, level 2, block 4: b = 1 + 2 + 4 = 7, so the depth is 11.
    """
    if name.startswith("stem."):
        return 0
    match = _LEVEL.match(name)
    if match is None:
        return num_layers(spec)
    column = int(match[1])
    level = int(match[2])
    if match[3]:  # alpha
        return column + 1
    # Blocks of the finer levels, then the block's number in its level (0 for down, up and up_top).
    return sum(spec.depths[:level]) + int(match[4] or 0) + column + 1


def is_alpha(name: str) -> bool:
    """Return true if the parameter is a column's residual scale."""
    return name.endswith(".alpha")


def decays(name: str, dimensions: int, decay_alpha: bool) -> bool:
    """Return true if weight decay applies: to all parameters but those with one dimension.

    alpha is 1-D here but 4-D in the published code, where it decays. ``decay_alpha`` decides.
    """
    return decay_alpha if is_alpha(name) else dimensions > 1
