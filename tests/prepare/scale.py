"""Prepare a synthetic listing: the driver's own work at any scale, without images.

``python -m tests.prepare.scale FOLDER IMAGES UNIT_ROWS`` prints the dataset's metrics, the CPU
seconds and the peak memory of that process as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import DatasetConfig
from pipeline.data.shards import ShardInfo
from pipeline.prepare import build
from pipeline.prepare.context import BuildContext
from pipeline.prepare.extract import ExtractedUnit
from pipeline.prepare.plan import ShardPlan, read_order
from pipeline.prepare.unit_record import IMAGE_RECORD, UnitRecord
from pipeline.sources.units import Part, Survey, Unit, fingerprint_items

CLASSES = 21_841
REPEATS = 100  # every 100th unit has one repeated content and one repeated name
ROOT = "/images"


def synthetic_survey(images: int, unit_rows: int) -> Survey:
    """Class folders cut into units."""
    classes = [(f"n{number:08d}", f"n{number:08d}") for number in range(CLASSES)]
    units = []
    for number, first in enumerate(range(0, images, unit_rows)):
        rows = min(unit_rows, images - first)
        label = number % CLASSES
        name = classes[label][0]
        part = Part(
            kind="folder",
            path=f"{ROOT}/{name}",
            first=0,
            last=rows,
            group=name,
            label=label,
            size=rows * 110_000,
        )
        units.append(Unit(number, "", (part,)))
    return Survey(
        layout="class_folders",
        classes=classes,
        units=units,
        fingerprint_items=fingerprint_items(ROOT, units),
        notes=[],
    )


def synthetic_unit(context: BuildContext, unit: Unit) -> ExtractedUnit:
    """Write what ``extract_unit`` leaves of a unit, except the images."""
    rows = unit.parts[0].last
    records = np.empty(rows, dtype=IMAGE_RECORD)
    numbers = np.random.default_rng(unit.number).integers(0, 2**64, (3, rows), dtype=np.uint64)
    records["high"], records["low"], records["key"] = numbers
    records["label"] = unit.parts[0].label
    if unit.number % REPEATS == 0:
        for field, row in (("high", 1), ("low", 1), ("key", 3)):
            records[field][row] = records[field][row - 1]
        pq.write_table(
            pa.table({"key": [f"{unit.number}/{row}" for row in range(rows)]}),
            context.unit_shard(unit.number),
        )
    np.save(context.image_records(unit.number), records)
    record = UnitRecord(
        images=rows,
        shard=ShardInfo(file="", rows=rows, bytes=0, digest="", index_digest=""),
        rejected=[
            {"key": f"{unit.number}/bad", "reason": "truncated", "detail": "", "file": ""},
        ],
        changed={},
        moments=[0.5] * 6,
        sides={"256": rows},
    )
    record.write(context.unit_record(unit.number))
    return ExtractedUnit(record, was_read=True)


def synthetic_tasks(
    function: Callable[[Any], Any], items: Sequence[Any]
) -> Iterator[tuple[Any, Any]]:
    """In place of the tasks of both phases: nothing is extracted, no shard is written."""
    (context,) = function.args  # type: ignore[attr-defined]  # a partial
    for item in items:
        if isinstance(item, ShardPlan):
            rows = len(read_order(context, item))
            yield item, ShardInfo(file=item.file, rows=rows, bytes=0, digest="", index_digest="")
        else:
            yield item, synthetic_unit(context, item)


def main(folder: str, images: int, unit_rows: int) -> None:
    start = time.process_time()
    config = DatasetConfig(root=ROOT, max_rejected=0.01)
    with mock.patch.object(build, "survey", lambda _: synthetic_survey(images, unit_rows)):
        metrics = build.prepare_dataset(
            name="set",
            config=config,
            target=Path(folder),
            seed=0,
            tasks=synthetic_tasks,
            progress=lambda *_: None,
            log=lambda *_: None,
        )
    print(json.dumps({**metrics, "seconds": time.process_time() - start, "peak_mb": peak_mb()}))


def peak_mb() -> float:
    """Peak memory of this process.

    ``getrusage`` would include the process that it was forked from.
    """
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index("VmHWM:") + 1]) / 1024


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
