"""Between the two phases: find duplicates, and give every other image a split, shard and row.

The plan is made from hashes alone. It depends on the images and the seed, not on who read them or
when. Worked example: three units, ``shard_rows = 2``; content and key stand for hashes.

    unit row  split       content  key  label
    0    0    train       A        30   0
    0    1    train       B        10   0
    0    2    train       A        50   0        same content, split and class as (0, 0)
    1    0    train       C        20   1        same content as the validation image (2, 0)
    1    1    train       D        40   1
    2    0    validation  C        99   1

1. Distribute the records over buckets by content. Sort each bucket by content, split and label.
   Neighbours show duplicates: (0, 2) is a "duplicate", (1, 0) is "in_validation".

2. Distribute the same records over buckets by key, and sort each bucket by key. Of neighbours with
   equal keys, that is, equal names, the later one is a "duplicate_name" (none here). The images
   that are left are the order of the split:

       train        10 (0, 1)   30 (0, 0)   40 (1, 1)
       validation   99 (2, 0)

   The key is a hash of the name, so this order is random: neighbours come from unrelated units.
   (The selection split and the test split have orders of their own; both are empty here.)

3. Cut each order into shards of equal size. 3 rows, at most 2 per shard, make 2 shards with the
   rows [0, 1) and [1, 3):

       train-00000.parquet: (0, 1)      train-00001.parquet: (0, 0), (1, 1)

Memory holds one bucket of about a million records at a time. On disk, a drop reason takes one byte
per image and an order eight bytes per row. An interrupted plan is made from scratch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.files import atomic, fsync_dir
from pipeline.prepare.buckets import Buckets, bucket_count
from pipeline.prepare.context import BuildContext
from pipeline.prepare.splits import SPLITS, TEST, VALIDATION, LastTrainingImages, Splitter
from pipeline.prepare.unit_record import IMAGE_RECORD
from pipeline.sources.units import Unit

# Codes of an image's drop reason: KEPT, or 1 + the index in DROP_REASONS. If several reasons hold,
# the first of them counts.
KEPT = 0
DROP_REASONS = ("duplicate_name", "in_test", "in_validation", "duplicate")
DUPLICATE_NAME = 1
IN_TEST = 2
IN_VALIDATION = 3
DUPLICATE = 4

ROW_REF = np.dtype([("unit", "<u4"), ("row", "<u4")])
PLAN_RECORD = np.dtype([*IMAGE_RECORD.descr, ("split", "i1"), *ROW_REF.descr])
CHUNK_ROWS = 1 << 18  # records that are distributed over the buckets at once

Value = TypeVar("Value", bound=np.generic)


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One shard: rows [first, last) of its split's order, a file of ``ROW_REF`` records."""

    split: str
    number: int
    first: int
    last: int

    @property
    def file(self) -> str:
        return f"{self.split}-{self.number:05d}.parquet"


@dataclass(frozen=True)
class DatasetPlan:
    """The plan of a dataset.

    ``dropped``: images by reason. ``labels``: images of each class, int64 (classes,), by split.
    """

    shards: list[ShardPlan]
    dropped: dict[str, int]
    labels: dict[str, NDArray[np.int64]]


def make_plan(
    context: BuildContext,
    units: Sequence[Unit],
    images_per_unit: NDArray[np.int64],
    num_classes: int,
) -> DatasetPlan:
    """Make the plan from the image records of all units.

    Writes the order of each split, and the drop reason of each image.

    Args:
        units: numbered from 0, in this order. Images of a unit without a split of its own, and
            images for selection, are held out by a hash of the content (see ``splits``).
        images_per_unit: kept by extraction; int64 (units,).
    """
    scratch = context.work / "plan"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    total = int(images_per_unit.sum())
    by_content = Buckets(scratch, "high", bucket_count(total), PLAN_RECORD)
    by_key = Buckets(scratch, "key", bucket_count(total), PLAN_RECORD)
    splitter = Splitter.of(context.config, context.seed, units)
    for records in _plan_records(context, units, splitter):
        by_content.add(records)
        by_key.add(records)

    # An image's number: its row, plus the images of all units before its own. Example: units of 3,
    # 2 and 1 images have the first numbers 0, 3 and 5, so row 1 of unit 1 is image 4.
    first_numbers = np.cumsum(images_per_unit) - images_per_unit
    drop_reasons = np.lib.format.open_memmap(scratch / "drop_reasons", "w+", np.uint8, (total,))
    last_images = [LastTrainingImages(splitter, num_classes, code) for code in splitter.held_out]
    for records in by_content:
        reasons = _find_repeated_contents(records)
        drop_reasons[_image_numbers(records, first_numbers)] = reasons
        for last in last_images:
            last.add(records[reasons == KEPT])
    by_split = (_with_last_images(records, last_images) for records in by_key)
    labels, dropped = _write_orders(context, by_split, drop_reasons, first_numbers, num_classes)
    drop_reasons.flush()
    os.replace(scratch / "drop_reasons", context.drop_reasons)
    fsync_dir(context.work)
    shutil.rmtree(scratch)
    shards = [
        shard
        for name in SPLITS
        for shard in _cut_into_shards(name, int(labels[name].sum()), context.config.shard_rows)
    ]
    return DatasetPlan(shards, dropped, labels)


def _plan_records(
    context: BuildContext, units: Iterable[Unit], splitter: Splitter
) -> Iterator[NDArray[np.void]]:
    """The records of all images, with split, unit and row, in chunks of about CHUNK_ROWS."""
    chunk: list[NDArray[np.void]] = []
    rows = 0
    for unit in units:
        images = np.load(context.image_records(unit.number), allow_pickle=False)
        records = np.empty(len(images), dtype=PLAN_RECORD)
        for field in IMAGE_RECORD.names or ():
            records[field] = images[field]
        records["split"] = splitter.codes(unit, images["low"])
        records["unit"] = unit.number
        records["row"] = np.arange(len(images))
        chunk.append(records)
        rows += len(records)
        if rows >= CHUNK_ROWS:
            yield np.concatenate(chunk)
            chunk = []
            rows = 0
    if chunk:
        yield np.concatenate(chunk)


def _with_last_images(
    records: NDArray[np.void], last_images: Iterable[LastTrainingImages]
) -> NDArray[np.void]:
    """The records, with one training image of each class that has lost all of them."""
    for last in last_images:
        records = last.restored(records)
    return records


def _image_numbers(
    records: NDArray[np.void], first_numbers: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The number of each image among all images of all units."""
    return np.asarray(first_numbers[records["unit"]] + records["row"])


def _find_repeated_contents(records: NDArray[np.void]) -> NDArray[np.uint8]:
    """The drop reason of each record of one bucket, KEPT for most.

    A duplicate has the content of an earlier image of the same class and split. The same image in
    two classes is kept in both. An image whose content is also in a split that must stay unseen by
    its own split is dropped, whatever its class: training images that are in validation, and
    everything that is in test.
    """
    # lexsort is stable: among equals, the image of the earlier unit and row comes first and is
    # kept.
    order = np.lexsort([records[name] for name in ("label", "split", "low", "high")])
    split = records["split"][order]
    same_content = _equals_previous(records["high"][order]) & _equals_previous(
        records["low"][order]
    )
    duplicate = same_content & _equals_previous(split) & _equals_previous(records["label"][order])
    reasons = np.where(duplicate, DUPLICATE, KEPT).astype(np.uint8)

    # Number the contents in sorted order (A A B C C -> 0 0 1 2 2) and mark those that a held-out
    # split has. Test comes last, because its reason comes before that of validation.
    content = np.cumsum(~same_content) - 1
    for held_out, reason in ((VALIDATION, IN_VALIDATION), (TEST, IN_TEST)):
        is_held_out = np.zeros(len(order), dtype=bool)
        is_held_out[content[split == held_out]] = True
        reasons[(split < held_out) & is_held_out[content]] = reason
    in_given_order = np.empty_like(reasons)
    in_given_order[order] = reasons
    return in_given_order


def _equals_previous(values: NDArray[Value]) -> NDArray[np.bool_]:
    """True where a value equals the one before it: [5, 5, 7, 7] -> [False, True, False, True]."""
    equal = np.zeros(len(values), dtype=bool)
    equal[1:] = values[1:] == values[:-1]
    return equal


def _write_orders(
    context: BuildContext,
    by_key: Iterable[NDArray[np.void]],
    drop_reasons: NDArray[np.uint8],
    first_numbers: NDArray[np.int64],
    num_classes: int,
) -> tuple[dict[str, NDArray[np.int64]], dict[str, int]]:
    """Write the kept images of each split in the order of their keys.

    Returns:
        Images of each class by split, and images dropped by reason.
    """
    labels = {name: np.zeros(num_classes, dtype=np.int64) for name in SPLITS}
    counts = np.zeros(len(DROP_REASONS) + 1, dtype=np.int64)  # by code
    with ExitStack() as stack:
        files = [stack.enter_context(atomic(context.order(name))) for name in SPLITS]
        for records in by_key:
            # Stable: of two images with the same name, the first one is kept.
            records = records[np.argsort(records["key"], kind="stable")]
            numbers = _image_numbers(records, first_numbers)
            reason = drop_reasons[numbers]
            reason[_equals_previous(records["key"])] = DUPLICATE_NAME
            drop_reasons[numbers] = reason
            counts += np.bincount(reason, minlength=len(counts))
            for code, (name, file) in enumerate(zip(SPLITS, files, strict=True)):
                kept = records[(reason == KEPT) & (records["split"] == code)]
                labels[name] += np.bincount(kept["label"], minlength=num_classes)
                row_refs = np.empty(len(kept), dtype=ROW_REF)
                row_refs["unit"] = kept["unit"]
                row_refs["row"] = kept["row"]
                file.write(row_refs.tobytes())
    dropped = {
        reason: count
        for reason, count in zip(DROP_REASONS, counts[1:].tolist(), strict=True)
        if count
    }
    return labels, dropped


def _cut_into_shards(split: str, rows: int, shard_rows: int) -> list[ShardPlan]:
    """The fewest shards of at most ``shard_rows``, sizes differing by at most one."""
    count = -(-rows // shard_rows)
    return [
        ShardPlan(split=split, number=i, first=rows * i // count, last=rows * (i + 1) // count)
        for i in range(count)
    ]


def read_order(context: BuildContext, shard: ShardPlan) -> NDArray[np.void]:
    """The rows of a shard: ``ROW_REF`` records, shape (rows,)."""
    count = shard.last - shard.first
    offset = shard.first * ROW_REF.itemsize
    return np.fromfile(context.order(shard.split), dtype=ROW_REF, count=count, offset=offset)
