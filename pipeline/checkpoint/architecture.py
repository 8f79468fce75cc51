"""The network that weights belong to, read off the names and shapes of its parameters.

Example: ``columns.7.levels.2.blocks.5.gamma`` of shape (512,) tells of at least 8 columns, 6 blocks
at level 2 and 512 channels there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypedDict

from pipeline.blocks import registry

_ALPHA = re.compile(r"columns\.(\d+)\.levels\.(\d)\.alpha$")
_BLOCK = re.compile(r"columns\.0\.levels\.(\d)\.blocks\.(\d+)\.(\w+\.)")
_CLASSIFIER = re.compile(r"classifiers\.(\d+)\.linear\.weight$")
LEVELS = 4
CLASSIFIER = "classifiers.0."  # start of the names of a single classifier


class Architecture(TypedDict, total=False):
    """Fields of ``NetworkSpec`` that decide names and shapes. ``block`` only if it is known."""

    channels: list[int]
    depths: list[int]
    columns: int
    num_classes: int
    huge: bool
    supervised: bool
    block: str
    stem_stride: int


def architecture_of(shapes: Mapping[str, Sequence[int]]) -> Architecture | None:
    """The architecture of weights under our names, or None if they are of no such network.

    Args:
        shapes: shape of each parameter, by our name.
    """
    channels = {int(match[2]): shapes[name][0] for name in shapes if (match := _ALPHA.match(name))}
    blocks = [match for name in shapes if (match := _BLOCK.match(name))]
    depths = {int(match[1]): 0 for match in blocks}
    for match in blocks:
        depths[int(match[1])] = max(depths[int(match[1])], 1 + int(match[2]))
    heads = {int(match[1]): name for name in shapes if (match := _CLASSIFIER.match(name))}
    # Another network, or a part of one.
    if set(channels) != set(range(LEVELS)) or set(depths) != set(channels):
        return None
    columns = {int(match[1]) for name in shapes if (match := _ALPHA.match(name))}
    architecture = Architecture(
        channels=[channels[level] for level in range(LEVELS)],
        depths=[depths[level] for level in range(LEVELS)],
        columns=1 + max(columns),
        # The last classifier is the model's.
        num_classes=shapes[heads[max(heads)]][0] if heads else 0,
        huge=any(".up_top." in name for name in shapes),
        supervised=len(heads) > 1,
    )
    kind = _block_kind({match[3] for match in blocks})
    if kind:
        architecture["block"] = kind
        # Only blocks of published networks are recognised, and those have one stem.
        architecture["stem_stride"] = 4
    return architecture


def last_classifier(shapes: Mapping[str, Sequence[int]]) -> str:
    """The start of the last classifier's names, such as "classifiers.3."; '' if there is none."""
    heads = [int(match[1]) for name in shapes if (match := _CLASSIFIER.match(name))]
    return f"classifiers.{max(heads)}." if heads else ""


def _block_kind(parts: set[str]) -> str:
    """The kind of block that has these parts; '' if it is not among those that name theirs."""
    for name, facts in registry.facts().items():
        if facts.published_names and facts.published_names.keys() <= parts:
            return name
    return ""
