"""Combinations that cannot work, and stages that need what nothing makes; told before anything starts (C5, C7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.blocks import registry
from pipeline.config.job_queries import (
    ORDER,
    TRAINING,
    batches,
    dataset_name,
    evaluate_image_size,
    prepared_names,
    stage_names,
    train_config,
)
from pipeline.config.schema import AugmentConfig, DatasetConfig, Job, TrainConfig
from pipeline.config.yaml_tree.diagnostics import Problem, refuse
from pipeline.errors import ConfigError
from pipeline.layout import DATASET_JSON, RunDir
from pipeline.sources import class_lists
from pipeline.suggest import did_you_mean

STRIDE = 32  # of the network's last level
SUPERVISED = 4  # positions of intermediate supervision
WEIGHTS = ".safetensors"


class _Checker:
    """Gathers problems; ``key`` of a problem becomes the place where it was written."""

    def __init__(self, job: Job, origins: Mapping[str, str], run_dir: RunDir | None) -> None:
        self.job, self.origins, self.run_dir = job, origins, run_dir
        self.problems: list[Problem] = []

    def report(self, key: str, cause: str, remedy: str) -> None:
        self.problems.append(Problem(self.place(key), f"{key}: {cause}", remedy))

    def place(self, key: str) -> str:
        """file:line of the key, or of the nearest section around it that was written."""
        while key:
            origin = self.origins.get(key, "default")
            if origin != "default":
                return origin
            key = key.rpartition(".")[0]
        return ""

    def attempt(self, stage: str, ask: Callable[[], object]) -> None:
        """Gather the ConfigError of a derived value, its place completed to a full key."""
        try:
            ask()
        except ConfigError as error:
            key = (
                error.place
                if error.place.startswith("stages.")
                else f"stages.{stage}.{error.place}"
            )
            self.report(key, error.cause, error.remedy)

    def has_weights(self, stage: str) -> bool:
        """Whether an earlier run left the weights of this stage."""
        return self.run_dir is not None and self.run_dir.weights(stage).is_file()

    def has_dataset(self, name: str) -> bool:
        """Whether an earlier run prepared this dataset."""
        return self.run_dir is not None and (self.run_dir.dataset(name) / DATASET_JSON).is_file()


def check(
    job: Job,
    world_size: int,
    origins: Mapping[str, str] | None = None,
    run_dir: RunDir | None = None,
) -> None:
    """Raise one ConfigError that names everything in the job that cannot work on ``world_size`` processes.

    ``origins`` (of a LoadedJob) turn keys into file:line; ``run_dir`` lets stages use what an earlier run left there.
    """
    checker = _Checker(job, origins or {}, run_dir)
    if not stage_names(job):
        checker.report("stages", "the job has no stage", f"write one of {', '.join(ORDER)}")
    _model(checker)
    for name, dataset in job.data.items():
        _dataset(checker, f"data.{name}", dataset)
    _prepare(checker)
    for stage in TRAINING:
        if stage in stage_names(job):
            _training(checker, stage, train_config(job, stage), world_size)
    _sources(checker)
    _used_data(checker)
    _evaluate(checker)
    refuse(checker.problems)


def _model(checker: _Checker) -> None:
    model = checker.job.model
    if model.stored_columns and model.activations != "exact":
        cause = (
            f"only columns under activations 'exact' can be stored, not under '{model.activations}'"
        )
        checker.report("model.stored_columns", cause, "activations: exact, or stored_columns: 0")


def _dataset(checker: _Checker, key: str, dataset: DatasetConfig) -> None:
    made_up = dataset.synthetic
    if made_up is None:
        if not dataset.root:
            checker.report(
                f"{key}.root",
                "no source is given",
                f"--set {key}.root=DIR, or made-up images: {key}.synthetic",
            )
        return
    if dataset.layout == "huggingface":
        checker.report(
            f"{key}.layout",
            "images cannot be generated in the layout 'huggingface'",
            "take class_tars",
        )
    if made_up.min_size > made_up.max_size:
        checker.report(
            f"{key}.synthetic.min_size",
            f"{made_up.min_size} is above max_size {made_up.max_size}",
            "swap them",
        )
    if made_up.min_size < dataset.min_side:
        cause = f"images of {made_up.min_size} pixels would all be quarantined (min_side {dataset.min_side})"
        checker.report(f"{key}.synthetic.min_size", cause, f"take {dataset.min_side} or more")
    if dataset.classes != "auto":
        try:
            count = len(class_lists.class_list(dataset.classes))
        except ConfigError as error:
            checker.report(f"{key}.classes", error.cause, error.remedy)
            return
        if made_up.classes > count:
            cause = f"{made_up.classes} classes wanted, the list {dataset.classes} has {count}"
            checker.report(f"{key}.synthetic.classes", cause, f"take at most {count}")


def _prepare(checker: _Checker) -> None:
    stage = checker.job.stages.prepare
    for name in stage.data if stage is not None else ():
        if name not in checker.job.data:
            remedy = did_you_mean(name, checker.job.data, "the job's datasets")
            checker.report("stages.prepare.data", f"the job has no dataset '{name}'", remedy)


def _training(checker: _Checker, stage: str, train: TrainConfig, world_size: int) -> None:
    key = f"stages.{stage}"
    if train.image_size % STRIDE:
        low = train.image_size // STRIDE * STRIDE
        near = " or ".join(str(size) for size in (low, low + STRIDE) if size)
        checker.report(
            f"{key}.image_size",
            f"{train.image_size} pixels is not a multiple of {STRIDE}",
            f"take {near}",
        )
    checker.attempt(stage, lambda: batches(train, world_size))
    _pairs(checker, stage, train, world_size)
    if train.intermediate_supervision and checker.job.model.columns < SUPERVISED:
        cause = f"intermediate supervision needs {SUPERVISED} columns, the model has {checker.job.model.columns}"
        checker.report(
            f"{key}.intermediate_supervision",
            cause,
            "intermediate_supervision: false, or a model of more columns",
        )
    if train.zero_stage == 0 and train.precision == "bf16":
        checker.report(
            f"{key}.zero_stage", "ZeRO stage 0 with bf16 keeps no fp32 masters", "take 1"
        )
    blocks = checker.job.model.block
    drop_path = checker.job.model.drop_path if train.drop_path is None else train.drop_path
    kinds = [registry.facts()[name] for name in ((blocks,) if isinstance(blocks, str) else blocks)]
    if drop_path and (titles := [kind.title for kind in kinds if not kind.shortcut]):
        owner = "model" if train.drop_path is None else key
        cause = f"{titles[0]} blocks have no shortcut, which stochastic depth needs"
        checker.report(f"{owner}.drop_path", cause, f"{owner}.drop_path: 0")
    if train.zero_stage == 3 and checker.job.model.compile:
        cause = "levels whose parameters ZeRO-3 gathers cannot be compiled"
        checker.report("model.compile", cause, f"{key}.zero_stage: 2, or compile: false")
    if train.warmup_epochs > train.epochs:
        cause = f"{train.warmup_epochs:g} epochs of warm-up in a stage of {train.epochs}"
        checker.report(f"{key}.warmup_epochs", cause, f"take at most {train.epochs}")
    for name in ("min_lr", "warmup_lr"):
        value = getattr(train, name)
        if value > train.base_lr:
            cause = f"{value:g} is above the peak learning rate {train.base_lr:g}"
            checker.report(f"{key}.{name}", cause, f"take at most {train.base_lr:g}")
    if train.eval_resize < 1:
        checker.report(
            f"{key}.eval_resize",
            f"{train.eval_resize:g} makes images smaller than the crop",
            "take 1 or more",
        )
    _order(checker, key, train)
    _crop(checker, f"{key}.augment", train.augment)


def _order(checker: _Checker, key: str, train: TrainConfig) -> None:
    """Variants of an epoch's order that exclude each other, or do not fit the global batch."""
    if train.balance and train.order == "windowed":
        cause = (
            "classes cannot be balanced within windows: a rare class's few images lie in few shards"
        )
        checker.report(f"{key}.balance", cause, "order: global, or balance: 0")
    batch, repeats = train.global_batch, train.repeated_augmentation
    if batch % repeats:
        divisors = ", ".join(
            str(one)
            for one in range(1, min(2 * repeats, max(1, batch // 2)) + 1)
            if batch % one == 0
        )
        cause = f"a global batch of {batch} images cannot hold each of its images {repeats} times"
        checker.report(
            f"{key}.repeated_augmentation",
            cause,
            f"take one of {divisors}, or another global_batch",
        )
    elif repeats > 1 and repeats == batch:
        cause = f"all {batch} images of a step would be views of a single one"
        checker.report(
            f"{key}.repeated_augmentation", cause, "take fewer, or a larger global_batch"
        )


def _pairs(checker: _Checker, stage: str, train: TrainConfig, world_size: int) -> None:
    """Mixup and cutmix pair neighbours within a micro batch."""
    if not (train.augment.mixup or train.augment.cutmix):
        return
    try:
        micro, _ = batches(train, world_size)
    except ConfigError:
        return  # told already
    if micro % 2:
        cause = f"mixup and cutmix pair the images of a micro batch, and {micro} is odd (on {world_size} processes)"
        key = "micro_batch" if train.micro_batch != "auto" else "global_batch"
        checker.report(
            f"stages.{stage}.{key}",
            cause,
            "an even micro_batch, or augment.mixup and augment.cutmix 0",
        )


def _crop(checker: _Checker, key: str, augment: AugmentConfig) -> None:
    (small, large), (narrow, wide) = augment.crop_scale, augment.crop_ratio
    if not small <= large <= 1:
        checker.report(
            f"{key}.crop_scale",
            f"[{small:g}, {large:g}] is no range of shares",
            "smaller first, at most 1",
        )
    if narrow > wide:
        checker.report(f"{key}.crop_ratio", f"[{narrow:g}, {wide:g}] is no range", "smaller first")
    if augment.randaugment > 10:
        checker.report(
            f"{key}.randaugment", f"magnitude {augment.randaugment} is above 10", "take 0 to 10"
        )


def _sources(checker: _Checker) -> None:
    """Every `from` names an earlier training stage of this job or of this run, or a weights file (C7)."""
    job, present = checker.job, stage_names(checker.job)
    for stage in present:
        section = getattr(job.stages, stage)
        source = getattr(section, "initial", "")
        key = f"stages.{stage}.from"
        if not source:
            continue
        if source in ORDER:
            earlier = [
                name
                for name in present
                if name in TRAINING and ORDER.index(name) < ORDER.index(stage)
            ]
            remedy = f"from: {earlier[-1]}" if earlier else "add the stage, or give a weights file"
            if source not in TRAINING or ORDER.index(source) >= ORDER.index(stage):
                checker.report(key, f"'{source}' makes no weights before {stage}", remedy)
            elif source not in present and not checker.has_weights(source):
                checker.report(
                    key, f"needs the weights of '{source}', which the job does not have", remedy
                )
        elif not source.endswith(WEIGHTS):
            remedy = did_you_mean(
                source, [name for name in present if name in TRAINING], "the job's training stages"
            )
            checker.report(
                key, f"'{source}' is neither a training stage nor a {WEIGHTS} file", remedy
            )
        elif not Path(source).is_file():
            checker.report(
                key, f"there is no file {source}", "correct the path, or name a training stage"
            )


def _used_data(checker: _Checker) -> None:
    """Every dataset that a stage uses exists and is prepared (C7)."""
    job = checker.job
    for stage in stage_names(job):
        if stage in ("prepare", "export"):
            continue
        key = f"stages.{stage}.data"
        try:
            name = dataset_name(job, stage)
        except ConfigError as error:
            checker.report(error.place, error.cause, error.remedy)
            continue
        if name not in job.data:
            checker.report(
                key,
                f"the job has no dataset '{name}'",
                did_you_mean(name, job.data, "the job's datasets"),
            )
        elif name not in prepared_names(job) and not checker.has_dataset(name):
            cause = f"no stage prepares the dataset '{name}'"
            remedy = (
                f"add {name} to stages.prepare.data"
                if job.stages.prepare
                else "add `prepare: {}` to the stages"
            )
            checker.report(key, cause, remedy)


def _evaluate(checker: _Checker) -> None:
    """The evaluated classes are those that the head was trained on."""
    job, stage = checker.job, checker.job.stages.evaluate
    if stage is None:
        return
    source = stage.initial
    if source.endswith(WEIGHTS) or (source in TRAINING and source in stage_names(job)):
        checker.attempt("evaluate", lambda: evaluate_image_size(job))
    if stage.image_size is not None and stage.image_size % STRIDE:
        cause = f"{stage.image_size} pixels is not a multiple of {STRIDE}"
        checker.report(
            "stages.evaluate.image_size",
            cause,
            f"take {stage.image_size // STRIDE * STRIDE or STRIDE}",
        )
    if source not in stage_names(job) or source not in TRAINING:
        return
    try:
        trained, evaluated = dataset_name(job, source), dataset_name(job, "evaluate")
    except ConfigError:
        return  # told already
    if trained == evaluated or trained not in job.data or evaluated not in job.data:
        return
    lists = job.data[trained].classes, job.data[evaluated].classes
    if lists[0] != lists[1]:
        cause = f"the head of '{source}' has the classes of {trained} ({lists[0]}), not those of {evaluated} ({lists[1]})"
        checker.report("stages.evaluate.data", cause, f"data: {trained}")
