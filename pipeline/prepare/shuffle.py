"""Second phase: write one final shard from rows of many unit shards.

Unit shards hold one or a few classes each, in the order of the source. A final shard takes rows
from thousands of them, in the order of a hash, so every final shard is a random sample of all
classes:

    unit shards    0: cat cat cat   1: cat dog dog   2: dog fox fox
    plan           train-00000: (1, 0) (2, 2) (0, 1) (2, 0) ...        (unit, row), from the plan
    shard          train-00000.parquet: cat fox cat dog ...
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards import GROUP_ROWS, Row, ShardInfo, index_path, write_shard
from pipeline.files import file_digest, write_json
from pipeline.prepare.context import BuildContext
from pipeline.prepare.plan import ShardPlan, read_order
from pipeline.prepare.unit_shard import UnitShard

MAX_OPEN_UNITS = 256  # a shard takes rows of thousands of units, and each open one holds a file


def shuffle_shard(context: BuildContext, shard: ShardPlan) -> ShardInfo:
    """Write one shard as planned, unless an earlier attempt has finished it.

    Raises:
        DataError: an image changed since the first phase wrote it.
    """
    finished = _finished_shard(context, shard)
    if finished is not None:
        return finished
    groups = _groups(context, read_order(context, shard))
    info = write_shard(context.shard(shard.file), groups, context.fingerprint)
    write_json(context.shard_record(shard.file), asdict(info))
    return info


def _finished_shard(context: BuildContext, shard: ShardPlan) -> ShardInfo | None:
    """The record of a shard whose files are intact; None if it has to be written (again)."""
    # The record alone does not prove that the shard is intact: a rebuild after damage writes the
    # records of all shards first and relies on this check to find the damaged ones.
    path = context.shard(shard.file)
    try:
        info = ShardInfo(**json.loads(context.shard_record(shard.file).read_text()))
        is_intact = (
            file_digest(path) == info.digest and file_digest(index_path(path)) == info.index_digest
        )
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return info if is_intact else None


def _groups(context: BuildContext, row_refs: NDArray[np.void]) -> Iterator[Sequence[Row]]:
    """The rows of a shard in groups, one group in memory at a time."""
    # Rows of one unit come at random positions of the shard, so recently used units stay open.
    open_unit = lru_cache(MAX_OPEN_UNITS)(lambda unit: UnitShard(context.unit_shard(unit)))
    for start in range(0, len(row_refs), GROUP_ROWS):
        group = row_refs[start : start + GROUP_ROWS].tolist()
        yield [open_unit(unit).row(row) for unit, row in group]
