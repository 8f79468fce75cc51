"""Between the phases: which images are duplicates, which split each belongs to, and which shard and place it gets.

Decided from hashes alone, so that the answer depends on the images and the seed, not on who read them or when. No more than
a bucket of about a million images is in memory at a time: one pass over the units' facts spills them by content, for the
duplicates, and by key, for the order; in files of one byte an image and eight bytes a row lies what is decided. A plan that
was interrupted is made again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.hashing import key_of, mix_array
from pipeline.files import atomic, fsync_dir
from pipeline.prepare.buckets import Buckets, bucket_count
from pipeline.prepare.extract import FACTS, BuildContext
from pipeline.sources.units import Unit

TRAIN, VALIDATION = 0, 1
SPLITS = ("train", "validation")
KEPT = 0
REASONS = (
    "duplicate_name",
    "in_validation",
    "duplicate",
)  # an image's fate is KEPT or 1 + a place here; the first applies
DUPLICATE_NAME, IN_VALIDATION, DUPLICATE = 1, 2, 3

WHERE = np.dtype([("unit", "<u4"), ("row", "<u4")])
MEMBER = np.dtype([*FACTS.descr, ("split", "i1"), *WHERE.descr])
CHUNK_ROWS = 1 << 18  # that are scattered at once


@dataclass(frozen=True)
class ShardPlan:
    """One shard: rows [first, last) of its split's order, a file of ``WHERE`` records."""

    split: str
    number: int
    first: int
    last: int

    @property
    def file(self) -> str:
        return f"{self.split}-{self.number:05d}.parquet"


@dataclass(frozen=True)
class DatasetPlan:
    """``dropped``: reason -> images. ``labels``: split -> int64 (classes,), images of each class."""

    shards: list[ShardPlan]
    dropped: dict[str, int]
    labels: dict[str, NDArray[np.int64]]


def make_plan(
    place: BuildContext, units: Sequence[Unit], images: NDArray[np.int64], num_classes: int
) -> DatasetPlan:
    """DatasetPlan from the facts of all units; writes the order of each split and the fate of each image.

    Args:
        units: in the order of their numbers, from 0; where one has no split of its own, ``validation_fraction`` of its images
            are held out by content hash. images: int64 (units,), what each has.
    """
    scratch = place.work / "plan"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    total = int(images.sum())
    contents, keys = (
        Buckets(scratch, field, bucket_count(total), MEMBER) for field in ("high", "key")
    )
    for members in _members(place, units):
        contents.add(members)
        keys.add(members)
    starts = np.cumsum(images) - images
    fates = np.lib.format.open_memmap(scratch / "fates", "w+", np.uint8, (total,))
    for members in contents:
        for reason, found in zip(
            (DUPLICATE, IN_VALIDATION), _repeated_contents(members), strict=True
        ):
            fates[_numbers(members[found], starts)] = reason
    labels, dropped = _order(place, keys, fates, starts, num_classes)
    fates.flush()
    os.replace(scratch / "fates", place.fates)
    fsync_dir(place.work)
    shutil.rmtree(scratch)
    shards = [
        shard
        for name in SPLITS
        for shard in _cut(name, int(labels[name].sum()), place.config.shard_rows)
    ]
    return DatasetPlan(shards, dropped, labels)


def _members(place: BuildContext, units: Iterable[Unit]) -> Iterator[NDArray[np.void]]:
    """Facts of all images, with the split and the place of each, some units at a time."""
    gathered: list[NDArray[np.void]] = []
    rows = 0
    for unit in units:
        facts = np.load(place.facts(unit.number), allow_pickle=False)
        members = np.empty(len(facts), dtype=MEMBER)
        for name in FACTS.names or ():
            members[name] = facts[name]
        members["split"] = _split(unit, facts["low"], place)
        members["unit"], members["row"] = unit.number, np.arange(len(facts))
        gathered.append(members)
        rows += len(members)
        if rows >= CHUNK_ROWS:
            yield np.concatenate(gathered)
            gathered, rows = [], 0
    if gathered:
        yield np.concatenate(gathered)


def _split(
    unit: Unit, contents: NDArray[np.uint64], place: BuildContext
) -> int | NDArray[np.bool_]:
    """By the unit; where it does not log, by the image's content, so that equal images are never on both sides."""
    if unit.split:
        return SPLITS.index(unit.split)
    held_out = min(int(place.config.validation_fraction * 2.0**64), 2**64 - 1)
    hashed = mix_array(contents ^ np.uint64(key_of("validation", place.seed)))
    return np.asarray(hashed < np.uint64(held_out))


def _numbers(members: NDArray[np.void], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of each image among all, units one after the other."""
    return np.asarray(starts[members["unit"]] + members["row"])


def _repeated_contents(members: NDArray[np.void]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Of one bucket, the images whose content is in the same class of the same split already (the same image under two
    classes stays), and the training images whose content is in the validation split."""
    order = np.lexsort(
        [members[name] for name in ("label", "split", "low", "high")]
    )  # stable: the first stays
    same = _as_before(members["high"], order) & _as_before(members["low"], order)
    split = members["split"][order]
    duplicate = same & _as_before(members["split"], order) & _as_before(members["label"], order)
    content = np.cumsum(~same) - 1
    held_out = np.zeros(len(order), dtype=bool)
    held_out[content[split == VALIDATION]] = True
    return order[duplicate], order[(split == TRAIN) & held_out[content]]


def _as_before(values: NDArray[Any], order: NDArray[np.intp]) -> NDArray[np.bool_]:
    """In this order, whether each value equals the one before it."""
    found = np.zeros(len(order), dtype=bool)
    values = values[order]
    found[1:] = values[1:] == values[:-1]
    return found


def _order(
    place: BuildContext,
    keys: Buckets,
    fates: NDArray[np.uint8],
    starts: NDArray[np.int64],
    num_classes: int,
) -> tuple[dict[str, NDArray[np.int64]], dict[str, int]]:
    """Write the kept images of each split by their keys. Returns the images of each class, and those dropped by reason."""
    labels = {name: np.zeros(num_classes, dtype=np.int64) for name in SPLITS}
    counts = np.zeros(len(REASONS) + 1, dtype=np.int64)
    with atomic(place.order("train")) as train, atomic(place.order("validation")) as validation:
        for members in keys:
            members = members[
                np.argsort(members["key"], kind="stable")
            ]  # a name twice: the first stays
            numbers = _numbers(members, starts)
            fate = fates[numbers]
            fate[1:][members["key"][1:] == members["key"][:-1]] = DUPLICATE_NAME
            fates[numbers] = fate
            counts += np.bincount(fate, minlength=len(counts))
            for split, (name, file) in enumerate(zip(SPLITS, (train, validation), strict=True)):
                chosen = members[(fate == KEPT) & (members["split"] == split)]
                labels[name] += np.bincount(chosen["label"], minlength=num_classes)
                where = np.empty(len(chosen), dtype=WHERE)
                where["unit"], where["row"] = chosen["unit"], chosen["row"]
                file.write(where.tobytes())
    return labels, {
        reason: count for reason, count in zip(REASONS, counts[1:].tolist(), strict=True) if count
    }


def read_order(place: BuildContext, shard: ShardPlan) -> NDArray[np.void]:
    """The rows of a shard: ``WHERE`` (rows,)."""
    count, offset = shard.last - shard.first, shard.first * WHERE.itemsize
    return np.fromfile(place.order(shard.split), dtype=WHERE, count=count, offset=offset)


def _cut(split: str, rows: int, shard_rows: int) -> list[ShardPlan]:
    """Shards of about ``shard_rows``, as even as can be."""
    count = -(-rows // shard_rows)
    return [ShardPlan(split, i, rows * i // count, rows * (i + 1) // count) for i in range(count)]
