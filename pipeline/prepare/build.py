"""Build one dataset: source -> units -> plan -> shards -> dataset.json.

    1. survey     list the source, cut it into units                         (sources/survey)
    2. extract    clean the images of each unit into a shard of its own      (extract, on workers)
    3. plan       from hashes: duplicates, splits, shard and row of an image (plan)
    4. shuffle    write the final shards from rows of many units             (shuffle, on workers)
    5. describe   write dataset.json, delete the work folder

A build that was interrupted at any moment continues from there when it is rerun, and ends with the
same bytes (D6): each unit and each shard has a record that is written last, and dataset.json is
written after all shards.

    <target>/classes.json           index, id and name of each class
    <target>/train-00000.parquet    shards (readable by any Parquet reader) and their indexes
    <target>/quarantine/            rejected files under their reason, listed in rejected.jsonl
    <target>/dataset.json           written last: splits, shards, digests and counts
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from pipeline.config.schema import DatasetConfig
from pipeline.data.description import DatasetDescription, SplitDescription
from pipeline.data.shards import FORMAT, ShardInfo, index_path
from pipeline.errors import DataError
from pipeline.files import file_digest, json_digest, write_json, write_text
from pipeline.layout import CLASSES_JSON, DATASET_JSON
from pipeline.prepare.context import BuildContext
from pipeline.prepare.extract import extract_unit
from pipeline.prepare.plan import DatasetPlan, make_plan
from pipeline.prepare.quarantine import write_quarantine_list
from pipeline.prepare.shuffle import shuffle_shard
from pipeline.prepare.splits import SPLITS
from pipeline.prepare.stats import DatasetStats
from pipeline.reporting import Log, Progress
from pipeline.sources.survey import survey
from pipeline.sources.units import Survey, Unit

# With fewer images, the share of rejected ones says little: the first class may happen to be bad.
MIN_IMAGES_TO_STOP_EARLY = 1000

# Where the source lies, and limits that only decide whether preparation may continue. The layout
# and the classes enter as they were found, so that "auto" equals the explicit value.
NOT_IN_FINGERPRINT = ("root", "layout", "classes", "synthetic", "max_rejected")

# Libraries that decode, encode or write. Recorded only: other versions may give other bytes.
RECORDED_LIBRARIES = ("opencv-python-headless", "simplejpeg", "pyarrow", "pillow")

Item = TypeVar("Item")
Result = TypeVar("Result")


class MapTasks(Protocol):
    """Applies a function to items on the available workers.

    Yields (item, result) in the order of completion.
    """

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
    """Build (or complete) a dataset in ``target``.

    Returns:
        Metrics: images, the images of each other split, rejected, duplicates, classes, bytes.

    Raises:
        DataError: the source is missing or unusable, too many of its images are rejected, or none
            is left.
    """
    source = survey(config)
    for note in source.notes:
        log(f"{name}: {note}", "warning")
    context = BuildContext(
        target=target, config=config, fingerprint=fingerprint(source, config, seed), seed=seed
    )
    # 1. Nothing to do if the finished dataset is up to date and intact.
    finished = _finished_dataset(context, tasks)
    if finished is not None:
        return _metrics(finished)
    # 2. Two phases on the workers, the plan between them in this process.
    _prepare_target(context, source)
    stats = _extract(name, context, source, tasks, progress)
    plan = make_plan(context, source.units, stats.images_per_unit, len(source.classes))
    _require_images(plan, context, source.units)
    for note in _selection_notes(plan, config):
        log(f"{name}: {note}", "warning")
    shards = _shuffle(name, context, plan, tasks, progress)
    # 3. dataset.json comes last: readers take its presence as "complete".
    write_quarantine_list(context, source.units, stats.images_per_unit, plan)
    description = _describe(context, source, stats, plan, shards)
    description.write(target)
    _remove_leftovers(context, shards)
    return _metrics(description)


def fingerprint(source: Survey, config: DatasetConfig, seed: int) -> str:
    """Digest of everything that the shards' bytes depend on.

    The content of the source counts, not its place: a copy in another folder gives the same
    fingerprint.
    """
    settings = {
        key: value for key, value in config.digest_values().items() if key not in NOT_IN_FINGERPRINT
    }
    # Names are for people; the order of the IDs decides the labels.
    class_ids = [class_id for class_id, _ in source.classes]
    return json_digest([FORMAT, source.layout, class_ids, source.fingerprint_items, settings, seed])


def _finished_dataset(context: BuildContext, tasks: MapTasks) -> DatasetDescription | None:
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


def _prepare_target(context: BuildContext, source: Survey) -> None:
    """Make the target ready for building.

    A finished dataset with another fingerprint is renamed. Unfinished work with another fingerprint
    is deleted. Unfinished work with this fingerprint is kept.
    """
    target = context.target
    if _fingerprint_of(target) not in ("", context.fingerprint):
        now = time.strftime("%Y%m%d-%H%M%S")
        target.rename(target.with_name(f"{target.name}.replaced-{now}"))
    # Units of other settings must not be mixed in; quarantined files belong to those units.
    if not context.stamp.exists() or context.stamp.read_text() != context.fingerprint:
        shutil.rmtree(context.work, ignore_errors=True)
        shutil.rmtree(context.quarantine, ignore_errors=True)
    context.work.mkdir(parents=True, exist_ok=True)

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
    write_text(context.stamp, context.fingerprint)


def _extract(
    name: str, context: BuildContext, source: Survey, tasks: MapTasks, progress: Progress
) -> DatasetStats:
    stats = DatasetStats(len(source.units))
    start = time.monotonic()
    for unit, record in tasks(partial(extract_unit, context), source.units):
        stats.add(unit.number, record)
        progress(
            f"{name}: reading",
            stats.units_done,
            len(source.units),
            f"{stats.rejected} rejected",
            *_rate(stats.kept, start),
        )
        # Stop early: a source of the wrong kind should not cost a night before its error appears.
        seen = stats.kept + stats.rejected
        is_last = stats.units_done == len(source.units)
        is_over_limit = stats.rejected > context.config.max_rejected * seen
        if is_over_limit and (is_last or seen >= MIN_IMAGES_TO_STOP_EARLY):
            raise stats.too_many_rejected(context)
    return stats


def _require_images(plan: DatasetPlan, context: BuildContext, units: Sequence[Unit]) -> None:
    """Raise DataError if a split that the source should fill is empty."""
    # A source may consist of images for evaluation only; then there is nothing to train on.
    has_training = any(unit.split in ("", "train") for unit in units)
    has_training &= context.config.validation_fraction < 1
    has_test = any(unit.split == "test" for unit in units)
    wanted = {"train": has_training, "validation": has_training or not has_test, "test": has_test}
    for split, is_wanted in wanted.items():
        if not is_wanted or plan.labels[split].any():
            continue
        remedy = (
            "raise validation_fraction, or add a val/ folder to the source"
            if split == "validation"
            else "add images"
        )
        raise DataError(
            f"no image is left for the {split} split", place=context.config.root, remedy=remedy
        )


def _selection_notes(plan: DatasetPlan, config: DatasetConfig) -> Iterator[str]:
    """Why there is no selection split although one was wanted."""
    if not config.selection_fraction or plan.labels["selection"].any():
        return
    if plan.labels["test"].any():
        yield (
            "selection_fraction is not used: the source has a test split, so the validation split "
            "chooses the best checkpoint"
        )
    else:
        share = f"{config.selection_fraction:g}"
        yield f"too few images for a selection split of {share}: none is held out"


def _shuffle(
    name: str, context: BuildContext, plan: DatasetPlan, tasks: MapTasks, progress: Progress
) -> dict[str, ShardInfo]:
    shards: dict[str, ShardInfo] = {}
    rows = 0
    start = time.monotonic()
    for shard, info in tasks(partial(shuffle_shard, context), plan.shards):
        shards[shard.file] = info
        rows += info.rows
        progress(f"{name}: shuffling", len(shards), len(plan.shards), *_rate(rows, start))
    return shards


def _rate(images: int, start: float) -> tuple[str, str]:
    rate = images / max(time.monotonic() - start, 1e-3)
    return f"{images:,} images", f"{rate:,.0f} images/s"


def _describe(
    context: BuildContext,
    source: Survey,
    stats: DatasetStats,
    plan: DatasetPlan,
    shards: dict[str, ShardInfo],
) -> DatasetDescription:
    splits = {
        split: SplitDescription(
            images=int(plan.labels[split].sum()),
            images_by_class=plan.labels[split].tolist(),
            shards=[shards[shard.file] for shard in plan.shards if shard.split == split],
        )
        for split in SPLITS
        if plan.labels[split].any()
    }
    mean, std = stats.mean_and_std()
    short_sides = sorted(stats.images_by_short_side.items(), key=lambda item: int(item[0]))
    return DatasetDescription(
        format=FORMAT,
        fingerprint=context.fingerprint,
        seed=context.seed,
        layout=source.layout,
        splits=splits,
        classes=len(source.classes),
        rejected=dict(sorted(stats.rejected_by_reason.items())),
        duplicates=plan.dropped,
        changed=dict(sorted(stats.changed_by_kind.items())),
        mean=[round(float(value), 6) for value in mean],
        std=[round(float(value), 6) for value in std],
        images_by_short_side=dict(short_sides),
        settings=context.config.model_dump(mode="json", exclude={"root", "synthetic"}),
        versions={name: importlib.metadata.version(name) for name in RECORDED_LIBRARIES},
    )


def _remove_leftovers(context: BuildContext, shards: dict[str, ShardInfo]) -> None:
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


def _metrics(description: DatasetDescription) -> dict[str, float]:
    # Training images are called "images"; selection and test only appear where they exist.
    names = {"train": "images"}
    return {
        **{
            names.get(name, name): float(split.images) for name, split in description.splits.items()
        },
        "rejected": float(sum(description.rejected.values())),
        "duplicates": float(sum(description.duplicates.values())),
        "classes": float(description.classes),
        "bytes": float(sum(shard.bytes for shard in description.shards())),
    }
