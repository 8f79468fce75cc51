"""How the classes of synthetic images look: a few cues per class, drawn from its WordNet ID.

One cue alone does not identify a class: all classes draw from the same few values, so many of them
are red, and many are striped.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from pipeline.data.hashing import key_of

Random = np.random.Generator
Colour = tuple[float, float, float]  # hue, saturation, value in [0, 1]

PLAIN, STRIPES, CHECKS, DOTS, RINGS = range(5)  # patterns

# Probability that an image takes a cue from its class. Colours get less: they would tell too much.
CUE_PROBABILITY = 0.97
CUE_PROBABILITIES = {"body": 0.85, "marking": 0.85, "ground": 0.5}


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """The cues of a class. Angles in turns (1.0 is 360 degrees)."""

    outline: tuple[float, float, float, float]  # lobes, their depth and sharpness, height / width
    body: Colour
    marking: Colour  # of the pattern and the mark
    pattern: tuple[int, float, float]  # kind, periods across an object, angle
    mark: tuple[int, float]  # corners of the central mark (0: none), size relative to the object
    count: int  # usual number of objects
    upright: bool  # objects stand upright, or are rotated at random
    ground: Colour  # of the far end of the background
    slope: float  # direction in which the background changes
    grain: tuple[float, float]  # waves of the background across the image, their angle


CUES = tuple(field.name for field in fields(Appearance))


@functools.lru_cache(maxsize=4096)
def appearance_of(wnid: str) -> Appearance:
    """The appearance of a class, from its WordNet ID."""
    # "look" is part of the seed: appearances stay the same when functions are renamed.
    return random_appearance(np.random.default_rng(key_of("look", wnid)))


def mixed_appearance(random: Random, own: Appearance, other: Appearance) -> Appearance:
    """Each cue from ``own`` with its probability, else from ``other``."""
    return Appearance(
        **{
            cue: getattr(
                own if random.random() < CUE_PROBABILITIES.get(cue, CUE_PROBABILITY) else other, cue
            )
            for cue in CUES
        }
    )


def random_appearance(random: Random) -> Appearance:
    """A random appearance. The order of the draws is part of the format of synthetic images."""

    def choose(values: Sequence[float]) -> float:
        return values[int(random.random() * len(values))]

    def colour(saturations: tuple[float, float], values: tuple[float, float]) -> Colour:
        return choose([0.02, 0.16, 0.42, 0.68]), choose(saturations), choose(values)

    return Appearance(
        outline=(
            choose([0, 2, 3, 4, 5, 7]),
            choose([0.22, 0.4]),
            choose([0.1, 0.9]),
            choose([0.5, 0.75, 1.0]),
        ),
        body=colour((0.5, 0.85), (0.5, 0.85)),
        marking=colour((0.25, 0.8), (0.25, 0.9)),
        pattern=(
            int(choose([PLAIN, STRIPES, CHECKS, DOTS, RINGS])),
            choose([2.4, 4.8]),
            choose([0.0, 0.25, 0.5, 0.75]),
        ),
        mark=(int(choose([0, 0, 3, 4, 5, 32])), choose([0.3, 0.45])),
        count=int(choose([1, 1, 2, 3, 5])),
        upright=bool(choose([0, 1, 1])),
        ground=colour((0.15, 0.5), (0.3, 0.75)),
        slope=choose([0.0, 0.25, 0.5, 0.75]),
        grain=(choose([3.0, 7.0, 14.0]), choose([0.0, 0.25, 0.5, 0.75])),
    )
