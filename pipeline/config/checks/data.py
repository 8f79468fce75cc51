"""Checks of the job's datasets."""

from __future__ import annotations

import itertools
from pathlib import Path

from pipeline.config.checks.checker import Checker
from pipeline.config.job_queries import TRAINING, dataset_name, stage_names
from pipeline.config.schema import DatasetConfig, SplitsConfig, SyntheticConfig
from pipeline.config.schema.shrink import SYNTHETIC_LAYOUTS
from pipeline.errors import ConfigError, DataError
from pipeline.layout import DATASET_JSON
from pipeline.sources import class_lists
from pipeline.sources.splits import named_splits
from pipeline.sources.survey import unknown_splits
from pipeline.suggest import did_you_mean


def check_datasets(checker: Checker) -> None:
    """Report datasets without a source, and synthetic ones that cannot be generated."""
    for name, dataset in checker.job.data.items():
        key = f"data.{name}"
        if dataset.prepared:
            _prepared(checker, key, dataset)
            continue
        if dataset.synthetic is not None:
            _synthetic(checker, key, dataset, dataset.synthetic)
        elif not dataset.root:
            remedy = f"--set {key}.root=DIR, or synthetic images: --set '{key}.synthetic={{}}'"
            checker.report(f"{key}.root", "no source is given", remedy)
        _splits(checker, key, dataset)


def _prepared(checker: Checker, key: str, dataset: DatasetConfig) -> None:
    """Report a prepared dataset that is not there, or that no cache makes readable."""
    place = dataset.prepared
    for other in ("root", "synthetic"):
        if getattr(dataset, other):
            cause = f"the dataset is prepared already ({place}), and nothing is read from {other}"
            checker.report(f"{key}.{other}", cause, f"remove {other}, or prepared")
    cluster = checker.job.cluster
    if "://" in place:
        if cluster.shard_cache is None:
            remedy = "cluster.shard_cache: {local_folder: FOLDER, max_gib: SIZE}"
            checker.report(f"{key}.prepared", "a dataset behind a URL needs a cache", remedy)
    # A folder that only the cluster's machines see is looked for there.
    elif cluster.kind == "local" and not (Path(place) / DATASET_JSON).is_file():
        cause = f"{place} holds no prepared dataset ({DATASET_JSON} is missing)"
        checker.report(f"{key}.prepared", cause, "correct the path")


def _splits(checker: Checker, key: str, dataset: DatasetConfig) -> None:
    """Report names of splits that contradict each other or that the source does not have."""
    key = f"{key}.splits"
    splits = dataset.splits
    if splits is None:
        return
    if dataset.synthetic is not None:
        checker.report(key, "synthetic images have splits of their own", "remove splits")
        return
    if isinstance(splits, str):
        return
    named = named_splits(splits)
    if not named:
        checker.report(key, "names no split", "name train, validation or test")
        return
    for split, name in named.items():
        if name.startswith("/") or ".." in name.split("/"):
            cause = f"{name} is outside of the source"
            checker.report(f"{key}.{split}", cause, f"a folder below {dataset.root}")
            return
    # A folder in two splits would train on the images that it is evaluated on.
    for (split, name), (other, other_name) in itertools.combinations(named.items(), 2):
        outer, inner = sorted((f"{name.strip('/')}/", f"{other_name.strip('/')}/"), key=len)
        if inner.startswith(outer) or outer == "./":
            cause = f"{other} ({other_name}) and {split} ({name}) have images in common"
            checker.report(f"{key}.{other}", cause, "name folders beside each other")
            return
    try:
        unknown = unknown_splits(dataset)
    except DataError as error:
        checker.report(key, error.cause, error.remedy)
        return
    for split, (cause, remedy) in unknown.items():
        checker.report(f"{key}.{split}", cause, remedy)


def check_training_images(checker: Checker) -> None:
    """Report datasets that are for evaluation only, and that a stage trains on."""
    for stage in TRAINING:
        if stage not in stage_names(checker.job):
            continue
        try:
            name = dataset_name(checker.job, stage)
        except ConfigError:
            continue  # reported elsewhere
        dataset = checker.job.data.get(name)
        if dataset is None or dataset.prepared:
            continue
        if isinstance(dataset.splits, SplitsConfig) and not dataset.splits.train:
            cause = f"names no training images, and the stage {stage} trains on them"
            checker.report(f"data.{name}.splits", cause, "add train: FOLDER")
        elif dataset.validation_fraction == 1 and dataset.synthetic is None:
            cause = f"1 holds out every image, and the stage {stage} trains on {name}"
            checker.report(f"data.{name}.validation_fraction", cause, "take less than 1")


def check_prepared_names(checker: Checker) -> None:
    """Report names in ``stages.prepare.data`` that are not datasets of the job."""
    stage = checker.job.stages.prepare
    for name in stage.data if stage is not None else ():
        if name not in checker.job.data:
            remedy = did_you_mean(name, checker.job.data, "the job's datasets")
            checker.report("stages.prepare.data", f"the job has no dataset '{name}'", remedy)
        elif checker.job.data[name].prepared:
            cause = f"'{name}' is prepared already (data.{name}.prepared)"
            checker.report("stages.prepare.data", cause, f"remove {name} from the list")


def _synthetic(
    checker: Checker, key: str, dataset: DatasetConfig, synthetic: SyntheticConfig
) -> None:
    if dataset.layout not in (*SYNTHETIC_LAYOUTS, "auto"):
        cause = f"images cannot be generated in the layout '{dataset.layout}'"
        checker.report(f"{key}.layout", cause, f"take one of {', '.join(SYNTHETIC_LAYOUTS)}")
    if synthetic.min_size > synthetic.max_size:
        cause = f"{synthetic.min_size} is above max_size {synthetic.max_size}"
        checker.report(f"{key}.synthetic.min_size", cause, "swap them")
    # Generation would succeed and preparation would then reject every image, minutes later.
    if synthetic.min_size < dataset.min_side:
        cause = (
            f"images of {synthetic.min_size} pixels would all be quarantined "
            f"(min_side {dataset.min_side})"
        )
        checker.report(f"{key}.synthetic.min_size", cause, f"take {dataset.min_side} or more")
    # With 'auto' the generator invents as many classes as it needs; a list is finite.
    if dataset.classes == "auto":
        return
    try:
        count = len(class_lists.class_list(dataset.classes))
    except ConfigError as error:
        checker.report_error(f"{key}.classes", error)
        return
    if synthetic.classes > count:
        cause = f"{synthetic.classes} classes wanted, but the list {dataset.classes} has {count}"
        checker.report(f"{key}.synthetic.classes", cause, f"take at most {count}")
