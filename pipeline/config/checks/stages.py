"""Checks that every stage finds its inputs: weights from `from`, prepared datasets (C7)."""

from __future__ import annotations

from pipeline.checkpoint.weights_source import is_weights_file, weights_source
from pipeline.config.checks.architecture import check_architecture
from pipeline.config.checks.checker import Checker
from pipeline.config.job_queries import (
    ORDER,
    TRAINING,
    dataset_name,
    evaluate_image_size,
    prepared_names,
    stage_names,
    training_stages,
)
from pipeline.errors import ConfigError
from pipeline.suggest import did_you_mean


def check_weights(checker: Checker) -> None:
    """Report every `from` that is not an earlier training stage (of job or run) or a file."""
    for stage in stage_names(checker.job):
        source = getattr(getattr(checker.job.stages, stage), "initial", "")
        if not source:
            continue
        if source in ORDER:
            _source_stage(checker, stage, source)
        else:
            _weights_file(checker, stage, source)


def _source_stage(checker: Checker, stage: str, source: str) -> None:
    present = stage_names(checker.job)
    key = f"stages.{stage}.from"
    # Training stages that run before this one, in the job's order.
    possible = [name for name in TRAINING if ORDER.index(name) < ORDER.index(stage)]
    # The latest of them is the likely intention: evaluate from finetune rather than from pretrain.
    earlier = [name for name in possible if name in present]
    remedy = f"from: {earlier[-1]}" if earlier else "add the stage, or give a weights file"
    if source not in possible:
        checker.report(key, f"'{source}' produces no weights before {stage}", remedy)
    elif source not in present and not checker.has_weights(source):
        cause = f"needs the weights of '{source}', which the job does not have"
        checker.report(key, cause, remedy)


def _weights_file(checker: Checker, stage: str, source: str) -> None:
    key = f"stages.{stage}.from"
    if not is_weights_file(source):
        remedy = did_you_mean(source, training_stages(checker.job), "the job's training stages")
        cause = f"'{source}' is neither a training stage nor a weights file"
        checker.report(key, cause, remedy)
    elif not weights_source(source).path.is_file():
        remedy = "correct the path, or name a training stage"
        checker.report(key, f"there is no file {weights_source(source).path}", remedy)
    else:
        check_architecture(checker, stage, source)


def check_used_data(checker: Checker) -> None:
    """Report every dataset that a stage uses but that does not exist or is not prepared."""
    job = checker.job
    for stage in stage_names(job):
        # Preparation names its datasets itself; export reads weights only.
        if stage in ("prepare", "export"):
            continue
        key = f"stages.{stage}.data"
        try:
            name = dataset_name(job, stage)
        except ConfigError as error:
            checker.report_error(error.place, error)
            continue
        if name not in job.data:
            remedy = did_you_mean(name, job.data, "the job's datasets")
            checker.report(key, f"the job has no dataset '{name}'", remedy)
        elif job.data[name].prepared:
            continue
        elif name not in prepared_names(job) and not checker.has_dataset(name):
            remedy = "add `prepare: {}` to the stages"
            if job.stages.prepare:
                remedy = f"add {name} to stages.prepare.data"
            checker.report(key, f"no stage prepares the dataset '{name}'", remedy)


def check_evaluation(checker: Checker) -> None:
    """Report an unknown or impossible image size, and classes the head was not trained on."""
    job = checker.job
    stage = job.stages.evaluate
    if stage is None:
        return
    source = stage.initial
    # If the source stage ran in an earlier job, its weights file tells the image size at run time.
    trains_here = source in TRAINING and source in stage_names(job)
    if is_weights_file(source) or trains_here:
        checker.attempt("evaluate", lambda: evaluate_image_size(job))
    if stage.image_size is not None:
        checker.check_image_size("stages.evaluate.image_size", stage.image_size)
    if trains_here:
        _same_classes(checker, source)


def _same_classes(checker: Checker, source: str) -> None:
    """A head has one output per class, in the order of its class list."""
    data = checker.job.data
    try:
        trained = dataset_name(checker.job, source)
        evaluated = dataset_name(checker.job, "evaluate")
    except ConfigError:
        return  # already reported
    if trained == evaluated or trained not in data or evaluated not in data:
        return
    of_head = data[trained].classes
    of_images = data[evaluated].classes
    if of_head != of_images:
        cause = (
            f"the head of '{source}' has the classes of {trained} ({of_head}), "
            f"not those of {evaluated} ({of_images})"
        )
        checker.report("stages.evaluate.data", cause, f"data: {trained}")
