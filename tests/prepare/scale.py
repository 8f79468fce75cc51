"""Preparation of a made-up listing: the driver's own work at any scale, with facts in place of images.

``python -m tests.prepare.scale FOLDER IMAGES ROWS`` (images a unit) prints the dataset's metrics, the seconds of CPU and the
peak memory of that process as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import DatasetConfig
from pipeline.data.shards import ShardInfo
from pipeline.prepare import build
from pipeline.prepare.extract import FACTS, BuildContext, UnitRecord
from pipeline.prepare.plan import ShardPlan, read_order
from pipeline.sources.units import Part, Survey, Unit, fingerprint_items

CLASSES = 21_841
REPEATS = 100  # one unit in so many has a content twice and a name twice
ROOT = "/images"


def made_up_survey(images: int, unit_rows: int) -> Survey:
    """Class folders cut into units."""
    classes = [(f"n{number:08d}", f"n{number:08d}") for number in range(CLASSES)]
    units = []
    for number, first in enumerate(range(0, images, unit_rows)):
        rows, label = min(unit_rows, images - first), number % CLASSES
        name = classes[label][0]
        units.append(
            Unit(
                number,
                "",
                (
                    Part(
                        kind="folder",
                        path=f"{ROOT}/{name}",
                        first=0,
                        last=rows,
                        group=name,
                        label=label,
                        size=rows * 110_000,
                    ),
                ),
            )
        )
    return Survey(
        layout="class_folders",
        classes=classes,
        units=units,
        fingerprint_items=fingerprint_items(ROOT, units),
        notes=[],
    )


def made_up_unit(place: BuildContext, unit: Unit) -> UnitRecord:
    """What ``spill_unit`` leaves of a unit, but the images."""
    rows = unit.parts[0].last
    facts = np.empty(rows, dtype=FACTS)
    numbers = np.random.default_rng(unit.number).integers(0, 2**64, (3, rows), dtype=np.uint64)
    facts["high"], facts["low"], facts["key"] = numbers
    facts["label"] = unit.parts[0].label
    if unit.number % REPEATS == 0:
        for field, row in (("high", 1), ("low", 1), ("key", 3)):
            facts[field][row] = facts[field][row - 1]
        pq.write_table(
            pa.table({"key": [f"{unit.number}/{row}" for row in range(rows)]}),
            place.spill(unit.number),
        )
    np.save(place.facts(unit.number), facts)
    entry = {"key": f"{unit.number}/bad", "reason": "truncated", "detail": "", "file": ""}
    record = UnitRecord(rows, {"bytes": 0}, [entry], {}, [0.5] * 6, {"256": rows})
    place.record(unit.number).write_text(json.dumps(asdict(record)))
    return record


def made_up_tasks(
    function: Callable[[Any], Any], items: Sequence[Any]
) -> Iterator[tuple[Any, Any]]:
    (place,) = function.args  # type: ignore[attr-defined]  # a partial
    for item in items:
        if isinstance(item, ShardPlan):
            yield item, ShardInfo(item.file, len(read_order(place, item)), 0, "", "")
        else:
            yield item, made_up_unit(place, item)


def main(folder: str, images: int, unit_rows: int) -> None:
    began = time.process_time()
    config = DatasetConfig(root=ROOT, max_rejected=0.01)
    with mock.patch.object(build, "survey", lambda _: made_up_survey(images, unit_rows)):
        metrics = build.prepare_dataset(
            "set", config, Path(folder), 0, made_up_tasks, lambda *_: None, lambda *_: None
        )
    print(json.dumps({**metrics, "seconds": time.process_time() - began, "peak_mb": peak_mb()}))


def peak_mb() -> float:
    """Of this program alone: ``getrusage`` counts the process that it was forked from as well."""
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index("VmHWM:") + 1]) / 1024


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
