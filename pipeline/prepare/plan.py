"""Between the phases: which images are duplicates, which split each belongs to, and which shard and place it gets.

Decided from hashes alone, so that the answer depends on the images and the seed, not on who read them or when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.hashing import key_of, mix_array
from pipeline.prepare.units import SplitName

TRAIN, VALIDATION = 0, 1
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class ShardPlan:
    """One shard: int64 (2, rows), the unit of each row and its row there, in order."""

    split: str
    number: int
    rows: NDArray[np.int64]

    @property
    def file(self) -> str:
        return f"{self.split}-{self.number:05d}.parquet"


@dataclass(frozen=True)
class Plan:
    """``dropped``: reason -> int64 (2, images), unit and row. ``labels``: split -> images of each class."""

    shards: list[ShardPlan]
    dropped: dict[str, NDArray[np.int64]]
    labels: dict[str, NDArray[np.int64]]


def make_plan(
    facts: Sequence[NDArray[np.void]],
    splits: Sequence[SplitName],
    num_classes: int,
    validation_fraction: float,
    shard_rows: int,
    seed: int,
) -> Plan:
    """
    Args:
        facts: of each unit (at least one), a record of ``spill.FACTS`` for each image. splits: of each unit.
        validation_fraction: share held out by content hash where a unit has no split of its own.
        shard_rows: images a shard, about.
    """
    rows = np.concatenate(facts)
    where = np.concatenate(
        [np.stack([np.full(len(unit), number), np.arange(len(unit))]) for number, unit in enumerate(facts)], axis=1
    ).astype(np.int64)
    split = _splits(rows, facts, splits, validation_fraction, seed)
    contents = _contents(rows)
    order = np.argsort(rows["key"], kind="stable")  # equal keys (a name twice): the first stays
    dropped: dict[str, NDArray[np.int64]] = {}
    gone = np.zeros(len(rows), dtype=bool)
    for reason, found in (
        ("duplicate_name", _repeated(order, rows["key"])),
        ("in_validation", _in_validation(contents, split)),
        ("duplicate", _duplicates(contents, rows["label"], split)),
    ):
        new = found & ~gone
        gone |= new
        if new.any():
            dropped[reason] = where[:, new]
    shards: list[ShardPlan] = []
    labels = {}
    for number, name in enumerate(SPLITS):
        chosen = order[(split[order] == number) & ~gone[order]]
        labels[name] = np.bincount(rows["label"][chosen], minlength=num_classes).astype(np.int64)
        count = -(-len(chosen) // shard_rows)
        bounds = [len(chosen) * i // count for i in range(count + 1)] if count else [0]
        shards += [ShardPlan(name, i, where[:, chosen[bounds[i] : bounds[i + 1]]]) for i in range(count)]
    return Plan(shards, dropped, labels)


def _splits(
    rows: NDArray[np.void], facts: Sequence[NDArray[np.void]], splits: Sequence[SplitName], fraction: float, seed: int
) -> NDArray[np.int8]:
    """By the unit; where it does not say, by the image's content, so that equal images are never on both sides."""
    hashed = mix_array(rows["low"] ^ np.uint64(key_of("validation", seed)))
    split = (hashed < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))).astype(np.int8)
    first = 0
    for unit, name in zip(facts, splits, strict=True):
        if name:
            split[first : first + len(unit)] = SPLITS.index(name)
        first += len(unit)
    return split


def _repeated(order: NDArray[np.int64], values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Every occurrence of a value but the first; ``order`` sorts the values stably."""
    found = np.zeros(len(values), dtype=bool)
    found[order[1:]] = values[order[1:]] == values[order[:-1]]
    return found


def _contents(rows: NDArray[np.void]) -> NDArray[np.int64]:
    """A number for each row, the same where the content is the same."""
    order = np.lexsort((rows["low"], rows["high"]))
    new = np.zeros(len(rows), dtype=np.int64)
    for half in ("high", "low"):
        new[1:] |= rows[half][order[1:]] != rows[half][order[:-1]]
    numbers = np.empty(len(rows), dtype=np.int64)
    numbers[order] = np.cumsum(new)
    return numbers


def _in_validation(contents: NDArray[np.int64], split: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Training images whose content is in the validation split too."""
    held_out = np.zeros(len(contents), dtype=bool)
    held_out[contents[split == VALIDATION]] = True
    return np.asarray((split == TRAIN) & held_out[contents])


def _duplicates(contents: NDArray[np.int64], labels: NDArray[np.int32], split: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Images whose content is in the same class of the same split already. The same image under two classes stays."""
    order = np.lexsort((labels, split, contents))  # stable: the first stays
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for values in (contents, labels, split):
        same &= values[order[1:]] == values[order[:-1]]
    found = np.zeros(len(order), dtype=bool)
    found[order[1:]] = same
    return found
