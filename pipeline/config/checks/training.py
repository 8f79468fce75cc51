"""Checks of the model and of a training stage: combinations of values that cannot work."""

from __future__ import annotations

from pipeline.blocks import registry
from pipeline.config.checks.checker import Checker
from pipeline.config.job_queries import batches
from pipeline.config.schema import AugmentConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.optimizers import registry as optimizers

SUPERVISED = 4  # columns that intermediate supervision attaches heads to
MAX_RANDAUGMENT = 10


def check_model(checker: Checker) -> None:
    """Report keys of the model that exclude each other."""
    model = checker.job.model
    if model.stored_columns and model.activations != "exact":
        cause = f"columns can be stored only with activations 'exact', not '{model.activations}'"
        checker.report("model.stored_columns", cause, "activations: exact, or stored_columns: 0")


def check_training(checker: Checker, stage: str, train: TrainConfig, world_size: int) -> None:
    """Report everything in a training stage that cannot work on ``world_size`` processes."""
    key = f"stages.{stage}"
    checker.check_image_size(f"{key}.image_size", train.image_size)
    checker.attempt(stage, lambda: batches(train, world_size))
    _pairs(checker, stage, train, world_size)
    _network(checker, key, train)
    _accumulation(checker, stage, train, world_size)
    _drop_path(checker, key, train)
    _optimizer(checker, key, train)
    _schedule(checker, key, train)
    _order(checker, key, train)
    _augmentation(checker, f"{key}.augment", train.augment)


def _pairs(checker: Checker, stage: str, train: TrainConfig, world_size: int) -> None:
    """Mixup and cutmix pair neighbouring images of a micro-batch, so it must be even."""
    if not (train.augment.mixup or train.augment.cutmix):
        return
    try:
        micro, _ = batches(train, world_size)
    except ConfigError:
        return  # already reported
    if micro % 2:
        # Point to the key that the user wrote: with 'auto', micro_batch follows from global_batch.
        cause = (
            f"mixup and cutmix pair the images of a micro batch, and {micro} is odd "
            f"(on {world_size} processes)"
        )
        remedy = "an even micro_batch, or augment.mixup and augment.cutmix 0"
        key = "micro_batch" if train.micro_batch != "auto" else "global_batch"
        checker.report(f"stages.{stage}.{key}", cause, remedy)


def _network(checker: Checker, key: str, train: TrainConfig) -> None:
    """Supervision, precision, ZeRO and compilation against the model."""
    model = checker.job.model
    if train.intermediate_supervision and model.columns < SUPERVISED:
        cause = (
            f"intermediate supervision needs {SUPERVISED} columns, the model has {model.columns}"
        )
        remedy = "intermediate_supervision: false, or a model with more columns"
        checker.report(f"{key}.intermediate_supervision", cause, remedy)
    # A bf16 number has 8 significant bits, so an update of less than 1/512 of a weight is rounded
    # away. ZeRO stages 1 to 3 update an fp32 copy of the weights, stage 0 has none.
    if train.zero_stage == 0 and train.precision != "fp32":
        cause = f"ZeRO stage 0 with {train.precision} keeps no fp32 master weights"
        checker.report(f"{key}.zero_stage", cause, "take 2")
    if train.zero_stage == 0 and train.offload_optimizer != "none":
        cause = "ZeRO stage 0 keeps the optimizer's state beside the weights"
        checker.report(f"{key}.offload_optimizer", cause, f"{key}.zero_stage: 2, or none")
    if "://" in train.offload_optimizer:
        cause = f"'{train.offload_optimizer}' is no folder of this machine"
        checker.report(f"{key}.offload_optimizer", cause, "none, cpu, or a folder on a local disk")
    # ZeRO-3 gathers parameters in hooks of the modules, which a compiled level would not run.
    if train.zero_stage == 3 and model.compile:
        cause = "levels whose parameters ZeRO-3 gathers cannot be compiled"
        checker.report("model.compile", cause, f"{key}.zero_stage: 2, or compile: false")


def _accumulation(checker: Checker, stage: str, train: TrainConfig, world_size: int) -> None:
    """Gradients of several micro-batches are added up in fp32, which ZeRO 1 does with fp32 only."""
    # DeepSpeed 0.19 then replaces its ZeRO optimizer by BF16_Optimizer, whose state is laid out
    # differently: checkpoints could not be read or written. Without accumulation nothing is added.
    if train.zero_stage != 1 or train.precision == "fp32":
        return
    try:
        micro, accumulation = batches(train, world_size)
    except ConfigError:
        return  # already reported
    if accumulation > 1:
        cause = (
            f"ZeRO stage 1 with {train.precision} would add up the gradients of {accumulation} "
            f"micro batches (of {micro} images) in {train.precision}"
        )
        checker.report(f"stages.{stage}.zero_stage", cause, "take 2; a run under way resumes")


def _drop_path(checker: Checker, key: str, train: TrainConfig) -> None:
    """Stochastic depth skips a block along its shortcut, so every kind needs one."""
    model = checker.job.model
    drop_path = model.drop_path if train.drop_path is None else train.drop_path
    names = (model.block,) if isinstance(model.block, str) else model.block
    kinds = [registry.facts()[name] for name in names]
    titles = [kind.title for kind in kinds if not kind.shortcut]
    if drop_path and titles:
        owner = "model" if train.drop_path is None else key
        cause = f"{titles[0]} blocks have no shortcut, which stochastic depth needs"
        checker.report(f"{owner}.drop_path", cause, f"{owner}.drop_path: 0")


def _optimizer(checker: Checker, key: str, train: TrainConfig) -> None:
    """Settings that the optimizer would ignore: someone expects an effect of them."""
    used = optimizers.facts()[train.optimizer].keys
    settings = {name for known in optimizers.facts().values() for name in known.keys}
    for name in sorted(settings.difference(used)):
        # Not "was it set?": a resolved job sets every key.
        default = TrainConfig.model_fields[name].default
        if getattr(train, name) != default:
            readers = " or ".join(optimizers.readers(name))
            cause = f"the optimizer '{train.optimizer}' has no {name}"
            checker.report(f"{key}.{name}", cause, f"remove it, or {key}.optimizer: {readers}")
    if train.nesterov and "nesterov" in used and not train.momentum:
        cause = "Nesterov momentum without momentum"
        checker.report(f"{key}.nesterov", cause, "nesterov: false, or a momentum above 0")


def _schedule(checker: Checker, key: str, train: TrainConfig) -> None:
    if train.warmup_epochs > train.epochs:
        cause = f"{train.warmup_epochs:g} epochs of warm-up in a stage of {train.epochs}"
        checker.report(f"{key}.warmup_epochs", cause, f"take at most {train.epochs}")
    for name, rate in (("min_lr", train.min_lr), ("warmup_lr", train.warmup_lr)):
        if rate > train.base_lr:
            cause = f"{rate:g} is above the peak learning rate {train.base_lr:g}"
            checker.report(f"{key}.{name}", cause, f"take at most {train.base_lr:g}")


def _order(checker: Checker, key: str, train: TrainConfig) -> None:
    """Orders of an epoch that exclude each other or do not fit the global batch."""
    # Example: 20 images of a class lie in at most 20 of 1000 shards; most windows hold none.
    if train.balance and train.order == "windowed":
        cause = (
            "classes cannot be balanced within windows: "
            "the few images of a rare class lie in few shards"
        )
        checker.report(f"{key}.balance", cause, "order: global, or balance: 0")
    batch = train.global_batch
    repeats = train.repeated_augmentation
    key = f"{key}.repeated_augmentation"
    if batch % repeats:
        # Example: batch 64 with 3 repeats -> "take one of 1, 2, 4": divisors near the wanted value.
        limit = min(2 * repeats, max(1, batch // 2))
        divisors = [str(size) for size in range(1, limit + 1) if batch % size == 0]
        cause = f"a global batch of {batch} images cannot hold each of its images {repeats} times"
        remedy = f"take one of {', '.join(divisors)}, or another global_batch"
        checker.report(key, cause, remedy)
    elif 1 < repeats == batch:
        cause = f"all {batch} images of a step would be views of a single one"
        checker.report(key, cause, "take fewer, or a larger global_batch")


def _augmentation(checker: Checker, key: str, augment: AugmentConfig) -> None:
    smallest, largest = augment.crop_scale
    if not smallest <= largest <= 1:
        cause = f"[{smallest:g}, {largest:g}] is not a range of shares"
        checker.report(f"{key}.crop_scale", cause, "smaller first, at most 1")
    narrowest, widest = augment.crop_ratio
    if narrowest > widest:
        cause = f"[{narrowest:g}, {widest:g}] is not a range"
        checker.report(f"{key}.crop_ratio", cause, "smaller first")
    if augment.randaugment > MAX_RANDAUGMENT:
        cause = f"magnitude {augment.randaugment} is above {MAX_RANDAUGMENT}"
        checker.report(f"{key}.randaugment", cause, f"take 0 to {MAX_RANDAUGMENT}")
