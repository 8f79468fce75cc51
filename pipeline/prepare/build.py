"""Build one dataset: source -> units -> plan -> shards -> dataset.json.

    1. survey     list the source, cut it into units                         (sources/survey)
    2. extract    clean the images of each unit into a shard of its own      (extract, on workers)
    3. plan       from hashes: duplicates, splits, shard and row of an image (plan)
    4. shuffle    write the final shards from rows of many units             (shuffle, on workers)
    5. describe   write dataset.json, delete the work folder

A build that was interrupted at any moment continues from there when it is rerun, and ends with the
same bytes (D6): each unit and each shard has a record that is written last, and dataset.json is
written after all shards. It also continues after a change of the settings that units do not depend
on, such as the limits that reject images.

    <target>/classes.json           index, id and name of each class
    <target>/train-00000.parquet    shards (readable by any Parquet reader) and their indexes
    <target>/quarantine/            rejected files under their reason, listed in rejected.jsonl
    <target>/dataset.json           written last: splits, shards, digests and counts
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.config.schema import DatasetConfig
from pipeline.data.description import DatasetDescription, SplitDescription
from pipeline.data.shards import FORMAT, ShardInfo
from pipeline.errors import DataError
from pipeline.prepare.changed_source import current_fingerprint
from pipeline.prepare.context import BuildContext
from pipeline.prepare.extract import extract_unit
from pipeline.prepare.fingerprint import units_fingerprint
from pipeline.prepare.map_tasks import MapTasks
from pipeline.prepare.plan import DatasetPlan, make_plan
from pipeline.prepare.quarantine import write_quarantine_list
from pipeline.prepare.shuffle import shuffle_shard
from pipeline.prepare.source_content import content_of, keep_times
from pipeline.prepare.splits import SPLITS
from pipeline.prepare.stats import DatasetStats
from pipeline.prepare.target import finished_dataset, prepare_target, remove_leftovers
from pipeline.reporting import Log, Progress
from pipeline.sources.survey import survey
from pipeline.sources.units import Survey, Unit

# With fewer images, the share of rejected ones says little: the first class may happen to be bad.
MIN_IMAGES_TO_STOP_EARLY = 1000
_NAMED = 5  # classes in a note

# Libraries that decode, encode or write. Recorded only: other versions may give other bytes.
RECORDED_LIBRARIES = ("opencv-python-headless", "simplejpeg", "pyarrow", "pillow")


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
        target=target,
        config=config,
        fingerprint=current_fingerprint(target, source, config, seed, tasks),
        units_fingerprint=units_fingerprint(source, config, seed),
        seed=seed,
    )
    # 1. Nothing to do if the finished dataset is up to date and intact.
    finished = finished_dataset(context, tasks)
    if finished is not None:
        keep_times(context)
        return _metrics(finished)
    # 2. Two phases on the workers, the plan between them in this process.
    finished_units = prepare_target(context, source)
    stats = _extract(name, context, source, tasks, progress)
    if finished_units:
        reused = len(source.units) - stats.units_read
        log(f"{name}: {reused} of {len(source.units)} units were read by an earlier call", "info")
    stats.require_few_rejected(context, source.units)
    if stats.left_out:
        log(f"{name}: {stats.left_out_in_words(context)}", "info")
    plan = make_plan(context, source.units, stats.images_per_unit, len(source.classes))
    write_quarantine_list(context, source.units, stats.images_per_unit, plan)
    _require_images(plan, context, source.units)
    for note in _selection_notes(plan, config):
        log(f"{name}: {note}", "warning")
    for note in _class_notes(plan, source):
        log(f"{name}: {note}", "warning")
    shards = _shuffle(name, context, plan, tasks, progress)
    # 3. dataset.json comes last: readers take its presence as "complete".
    description = _describe(context, source, stats, plan, shards)
    keep_times(context)
    description.write(target)
    remove_leftovers(context, shards)
    return _metrics(description)


def _extract(
    name: str, context: BuildContext, source: Survey, tasks: MapTasks, progress: Progress
) -> DatasetStats:
    stats = DatasetStats(len(source.units))
    start = time.monotonic()
    for unit, extracted in tasks(partial(extract_unit, context), source.units):
        stats.add(unit.number, extracted)
        progress(
            f"{name}: reading",
            stats.units_done,
            len(source.units),
            f"{stats.rejected} rejected",
            *_rate(stats.kept, start),
        )
        # Stop early: a source of the wrong kind should not cost a night before its error appears.
        if stats.kept + stats.rejected >= MIN_IMAGES_TO_STOP_EARLY:
            stats.require_few_rejected(context, source.units)
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
            "add images (every class keeps one for training), raise validation_fraction, or add "
            "a val/ folder to the source"
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


def _class_notes(plan: DatasetPlan, source: Survey) -> Iterator[str]:
    """Classes that the held-out images lack, or that have lost all of their training images."""
    surveyed = {part.label for unit in source.units for part in unit.parts if part.images}
    trained = plan.labels["train"] > 0
    for split in ("train", "validation"):
        images = plan.labels[split]
        if not images.any() or not trained.any():
            continue
        # The survey has noted classes without an image in the source.
        wanted = trained if split == "validation" else np.isin(np.arange(len(images)), [*surveyed])
        missing = np.flatnonzero(wanted & (images == 0)).tolist()
        if missing and (split == "train" or any(unit.split == "" for unit in source.units)):
            names = ", ".join(source.classes[label][0] for label in missing[:_NAMED])
            yield f"{len(missing)} classes have no {split} images in the prepared set: {names}"


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
        source_content=content_of(stats.contents),
        settings=context.config.model_dump(mode="json", exclude={"root", "synthetic"}),
        versions={name: importlib.metadata.version(name) for name in RECORDED_LIBRARIES},
    )


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
