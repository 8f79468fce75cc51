"""Making one dataset: source -> units -> plan -> shards -> dataset.json. Whatever ends it midway, a rerun goes on from there
and ends with the same bytes.

    <target>/classes.json           index, id and name of each class
    <target>/train-00000.parquet    shards and their indexes, as standard readers and `pipeline.data` read them
    <target>/quarantine/            rejected files under their reason, listed in rejected.jsonl
    <target>/dataset.json           written last: splits, shards and digests, counts, what was rejected
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeline.config.schema import DatasetConfig
from pipeline.data.shards import FORMAT, ShardInfo, index_path
from pipeline.errors import DataError
from pipeline.files import file_digest, json_digest, write_json, write_text
from pipeline.layout import CLASSES_JSON, DATASET_JSON
from pipeline.prepare.extract import BuildContext, spill_unit
from pipeline.prepare.plan import SPLITS, DatasetPlan, make_plan
from pipeline.prepare.quarantine import list_rejected
from pipeline.prepare.shuffle import mix_shard
from pipeline.prepare.stats import DatasetStats
from pipeline.reporting import Log, Progress
from pipeline.sources.survey import survey
from pipeline.sources.units import Survey

ENOUGH = 1000  # images, before the share of rejected ones can stop the work early

Item = TypeVar("Item")
Result = TypeVar("Result")


class MapTasks(Protocol):
    """Applies a function to items on the workers there are; yields (item, result) as they are done, in any order."""

    def __call__(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Result]]: ...


def prepare_dataset(
    name: str,
    config: DatasetConfig,
    target: Path,
    seed: int,
    tasks: MapTasks,
    progress: Progress,
    log: Log,
) -> dict[str, float]:
    """Make (or complete) a dataset in ``target``; returns metrics: images, validation, rejected, duplicates, classes, bytes.

    Raises:
        DataError: the source is missing or unusable, too many of its images are bad, or none is left.
    """
    found = survey(config)
    for note in found.notes:
        log(f"{name}: {note}", "warning")
    place = BuildContext(target, config, fingerprint(found, config, seed), seed)
    if (done := _complete(place, tasks)) is not None:
        return done
    _begin(place, found)
    totals = _spill(name, place, found, tasks, progress)
    plan = make_plan(place, found.units, totals.images, len(found.classes))
    _refuse_empty(plan, place)
    shards = _mix(name, place, plan, tasks, progress)
    list_rejected(place, found.units, totals.images, plan)
    description = _describe(place, found, totals, plan, shards)
    write_json(target / DATASET_JSON, description)
    _tidy(place, shards)
    return _metrics(description)


def fingerprint(found: Survey, config: DatasetConfig, seed: int) -> str:
    """Digest of all that the shards' bytes depend on: where the source lies does not matter, what is in it does."""
    settings = config.model_dump(
        mode="json", exclude={"root", "layout", "classes", "synthetic", "max_rejected"}
    )
    return json_digest(
        [
            FORMAT,
            found.layout,
            [one for one, _ in found.classes],
            found.fingerprint_items,
            settings,
            seed,
        ]
    )


def _complete(place: BuildContext, tasks: MapTasks) -> dict[str, float] | None:
    """The metrics of a dataset that is all there and as it was written."""
    if _fingerprint_of(place.target) != place.fingerprint or place.work.exists():
        return None
    description = json.loads((place.target / DATASET_JSON).read_text())
    intact = [whole for _, whole in tasks(partial(_is_intact, place.target), _shards(description))]
    return _metrics(description) if all(intact) else None


def _is_intact(target: Path, shard: dict[str, Any]) -> bool:
    path = target / shard["file"]
    try:
        return (file_digest(path), file_digest(index_path(path))) == (
            shard["digest"],
            shard["index_digest"],
        )
    except FileNotFoundError:
        return False


def _shards(description: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for split in description["splits"].values() for shard in split["shards"]]


def _fingerprint_of(target: Path) -> str:
    """The fingerprint of the finished dataset in ``target``; '' if there is none."""
    try:
        return str(json.loads((target / DATASET_JSON).read_text())["fingerprint"])
    except (FileNotFoundError, ValueError, KeyError):
        return ""


def _begin(place: BuildContext, found: Survey) -> None:
    """Another dataset that is here is moved aside, an unfinished attempt at another cleared away; one at this one stays."""
    if _fingerprint_of(place.target) not in ("", place.fingerprint):
        place.target.rename(
            place.target.with_name(f"{place.target.name}.replaced-{time.strftime('%Y%m%d-%H%M%S')}")
        )
    stamp = place.work / "fingerprint"
    if not stamp.exists() or stamp.read_text() != place.fingerprint:
        for leftover in (place.work, place.quarantine):
            shutil.rmtree(leftover, ignore_errors=True)
    place.work.mkdir(parents=True, exist_ok=True)
    if _fingerprint_of(
        place.target
    ):  # some of its shards are damaged: the others need not be made again
        for shard in _shards(json.loads((place.target / DATASET_JSON).read_text())):
            write_json(place.work / f"{shard['file']}.json", shard)
        (place.target / DATASET_JSON).unlink()
    for cut_short in (*place.work.glob(".*.tmp"), *place.target.glob(".*.tmp")):
        cut_short.unlink()
    classes = [
        {"index": index, "id": one, "name": name} for index, (one, name) in enumerate(found.classes)
    ]
    write_json(place.target / CLASSES_JSON, classes)
    write_text(stamp, place.fingerprint)


def _spill(
    name: str, place: BuildContext, found: Survey, tasks: MapTasks, progress: Progress
) -> DatasetStats:
    totals, begin = DatasetStats(len(found.units)), time.monotonic()
    for unit, record in tasks(partial(spill_unit, place), found.units):
        totals.add(unit.number, record)
        progress(
            f"{name}: reading",
            totals.done,
            len(found.units),
            f"{_paced(totals.kept, begin)}, {totals.bad} rejected",
        )
        seen = totals.kept + totals.bad
        enough = seen >= ENOUGH or totals.done == len(found.units)
        if enough and totals.bad > place.config.max_rejected * seen:
            raise totals.too_many_bad(place)
    return totals


def _refuse_empty(plan: DatasetPlan, place: BuildContext) -> None:
    for split in SPLITS:
        if not plan.labels[split].any():
            remedy = (
                "add images"
                if split == "train"
                else "raise validation_fraction, or add a val/ folder to the source"
            )
            raise DataError(
                f"no image is left for the {split} split", place=place.config.root, remedy=remedy
            )


def _paced(images: int, begin: float) -> str:
    return f"{images} images, {images / max(time.monotonic() - begin, 1e-3):.0f} a second"


def _mix(
    name: str, place: BuildContext, plan: DatasetPlan, tasks: MapTasks, progress: Progress
) -> dict[str, ShardInfo]:
    shards: dict[str, ShardInfo] = {}
    rows, begin = 0, time.monotonic()
    for shard, info in tasks(partial(mix_shard, place), plan.shards):
        shards[shard.file] = info
        rows += info.rows
        progress(f"{name}: mixing", len(shards), len(plan.shards), _paced(rows, begin))
    return shards


def _describe(
    place: BuildContext,
    found: Survey,
    totals: DatasetStats,
    plan: DatasetPlan,
    shards: dict[str, ShardInfo],
) -> dict[str, Any]:
    mean, std = totals.mean_and_std()
    return {
        "format": FORMAT,
        "fingerprint": place.fingerprint,
        "seed": place.seed,
        "layout": found.layout,
        "splits": {
            split: {
                "images": int(plan.labels[split].sum()),
                "images_by_class": plan.labels[split].tolist(),
                "shards": [
                    shards[shard.file].as_dict() for shard in plan.shards if shard.split == split
                ],
            }
            for split in SPLITS
        },
        "classes": len(found.classes),
        "rejected": dict(sorted(totals.rejected.items())),
        "duplicates": plan.dropped,
        "changed": dict(sorted(totals.changed.items())),
        "mean": [round(float(value), 6) for value in mean],
        "std": [round(float(value), 6) for value in std],
        "images_by_short_side": dict(sorted(totals.sides.items(), key=lambda item: int(item[0]))),
        "settings": place.config.model_dump(mode="json", exclude={"root", "synthetic"}),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("opencv-python-headless", "simplejpeg", "pyarrow", "pillow")
        },
    }


def _tidy(place: BuildContext, shards: dict[str, ShardInfo]) -> None:
    """Nothing stays but the dataset: no work files, no shards of an earlier one, nothing of workers that were killed.

    The work folder goes last: as long as it is there, a rerun comes here again.
    """
    for cut_short in place.target.rglob(".*.tmp"):
        cut_short.unlink()
    for path in place.target.glob("*.parquet"):
        if path.name not in shards:
            path.unlink()
            path.with_suffix(".idx").unlink(missing_ok=True)
    shutil.rmtree(place.work)


def _metrics(description: dict[str, Any]) -> dict[str, float]:
    splits = description["splits"]
    return {
        "images": float(splits["train"]["images"]),
        "validation": float(splits["validation"]["images"]),
        "rejected": float(sum(description["rejected"].values())),
        "duplicates": float(sum(description["duplicates"].values())),
        "classes": float(description["classes"]),
        "bytes": float(sum(shard["bytes"] for shard in _shards(description))),
    }
