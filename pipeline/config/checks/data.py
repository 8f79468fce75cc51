"""Checks of the job's datasets."""

from __future__ import annotations

from pipeline.config.checks.checker import Checker
from pipeline.config.schema import DatasetConfig, SyntheticConfig
from pipeline.config.schema.shrink import SYNTHETIC_LAYOUTS
from pipeline.errors import ConfigError
from pipeline.sources import class_lists
from pipeline.suggest import did_you_mean


def check_datasets(checker: Checker) -> None:
    """Report datasets without a source, and synthetic ones that cannot be generated."""
    for name, dataset in checker.job.data.items():
        key = f"data.{name}"
        if dataset.synthetic is not None:
            _synthetic(checker, key, dataset, dataset.synthetic)
        elif not dataset.root:
            remedy = f"--set {key}.root=DIR, or synthetic images: --set '{key}.synthetic={{}}'"
            checker.report(f"{key}.root", "no source is given", remedy)


def check_prepared_names(checker: Checker) -> None:
    """Report names in ``stages.prepare.data`` that are not datasets of the job."""
    stage = checker.job.stages.prepare
    for name in stage.data if stage is not None else ():
        if name not in checker.job.data:
            remedy = did_you_mean(name, checker.job.data, "the job's datasets")
            checker.report("stages.prepare.data", f"the job has no dataset '{name}'", remedy)


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
