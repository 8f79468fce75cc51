"""The directory of a dataset: what earlier attempts have left there, and what is still of use.

left there                                      settings now       is
finished dataset                                the same           complete, if it is intact
finished dataset                                other              renamed
work folder                                     the same           continued
work folder                                     other limits,      continued: the units are
                                                splits or shards   kept, the shards are not
work folder                                     other              deleted
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from pipeline.data.description import DatasetDescription
from pipeline.data.shards import ShardInfo, index_path
from pipeline.files import file_digest, write_json, write_text
from pipeline.layout import CLASSES_JSON, DATASET_JSON
from pipeline.prepare.context import BuildContext
from pipeline.prepare.map_tasks import MapTasks
from pipeline.sources.units import Survey


def finished_dataset(context: BuildContext, tasks: MapTasks) -> DatasetDescription | None:
    """The description of the dataset in the target if it is complete, up to date and undamaged."""
    if _fingerprint_of(context.target) != context.fingerprint or context.work.exists():
        return None
    description = _read_description(context.target)
    if description is None:
        return None
    shards = list(description.shards())
    intact = [is_intact for _, is_intact in tasks(partial(_is_intact, context.target), shards)]
    return description if all(intact) else None


def _is_intact(target: Path, shard: ShardInfo) -> bool:
    path = target / shard.file
    try:
        digests = (file_digest(path), file_digest(index_path(path)))
    except FileNotFoundError:
        return False
    return digests == (shard.digest, shard.index_digest)


def _fingerprint_of(target: Path) -> str:
    """The fingerprint of the finished dataset in ``target``; '' if there is none.

    Reads nothing else of dataset.json: a dataset of an older format must be recognised as another
    dataset, too.
    """
    try:
        return str(json.loads((target / DATASET_JSON).read_text())["fingerprint"])
    except (FileNotFoundError, ValueError, KeyError):
        return ""


def _read_description(target: Path) -> DatasetDescription | None:
    """None if there is none that can be used."""
    try:
        return DatasetDescription.read(target)
    except (FileNotFoundError, ValueError):
        return None


def prepare_target(context: BuildContext, source: Survey) -> int:
    """Make the target ready for building, as the table above says.

    Returns:
        The number of units that earlier attempts have extracted.
    """
    target = context.target
    if _fingerprint_of(target) not in ("", context.fingerprint):
        now = time.strftime("%Y%m%d-%H%M%S")
        target.rename(target.with_name(f"{target.name}.replaced-{now}"))
    _prepare_work(context)

    # A finished dataset with this fingerprint is here because some of its shards are damaged. Turn
    # it back into unfinished work in which every shard has its record: those that do not match
    # theirs are written again.
    if _fingerprint_of(target):
        description = _read_description(target)
        for shard in description.shards() if description is not None else ():
            write_json(context.shard_record(shard.file), asdict(shard))
        (target / DATASET_JSON).unlink()

    for temporary in (*context.work.glob(".*.tmp"), *target.glob(".*.tmp")):  # of killed workers
        temporary.unlink()
    classes = [
        {"index": index, "id": class_id, "name": name}
        for index, (class_id, name) in enumerate(source.classes)
    ]
    write_json(target / CLASSES_JSON, classes)
    return context.finished_units()


def _prepare_work(context: BuildContext) -> None:
    """Keep, reduce or delete the work folder of an earlier attempt, and stamp it."""
    is_same = _text(context.stamp) == context.fingerprint
    # Version 0.1.0 wrote no second stamp: its units serve the same settings only.
    has_units = is_same or _text(context.units_stamp) == context.units_fingerprint
    if not has_units:
        # Units of other settings must not be mixed in; quarantined files belong to those units.
        shutil.rmtree(context.work, ignore_errors=True)
        shutil.rmtree(context.quarantine, ignore_errors=True)
        write_text(context.units_stamp, context.units_fingerprint)
    elif not is_same:
        # Shards of other settings have the same names: without their records they are written
        # again.
        for record in context.shard_records():
            record.unlink()
    write_text(context.stamp, context.fingerprint)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def remove_leftovers(context: BuildContext, shards: dict[str, ShardInfo]) -> None:
    """Delete the work folder, temporary files of killed workers, and shards of an earlier dataset.

    The work folder goes last: while it exists, a rerun comes here again.
    """
    for temporary in context.target.rglob(".*.tmp"):
        temporary.unlink()
    for path in context.target.glob("*.parquet"):
        if path.name not in shards:
            path.unlink()
            index_path(path).unlink(missing_ok=True)
    shutil.rmtree(context.work)
