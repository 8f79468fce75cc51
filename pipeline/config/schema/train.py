"""The job's ``pretrain`` and ``finetune`` stages: training and augmentation.

Most keys decide what is computed, so a resumed run must not change them. The exceptions are marked
``changes=NOTHING`` and say why.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from pipeline.config.schema import shrink
from pipeline.config.schema.rules import NOTHING, Rules
from pipeline.config.schema.section import Fraction, Preprocessing, Section, known_name
from pipeline.config.schema.shrink import at_most, fixed
from pipeline.optimizers import registry

_OPTIMIZERS = list(registry.facts())
# A decay rate of 1 would keep the first value for ever; a betas of 1 divides by zero.
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


def _read_by(key: str) -> str:
    """The end of a description: the optimizers that read the key."""
    return f" ({', '.join(registry.readers(key))})."


class AugmentConfig(Section):
    """Augmentation during training; each random choice is a function of (seed, epoch, sample)."""

    crop_scale: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.08, 1.0), description="Smallest and largest area of the random crop (share of image)."
    )
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.75, 1.3333), description="Smallest and largest aspect ratio of the random crop."
    )
    crop_padding: Annotated[float, Field(ge=0.0, le=0.5)] = Field(
        0.0,
        description="How far the random crop may leave the image on each side (share of that side; "
        "0: not at all). Mirrored pixels fill it.",
    )
    flip: Fraction = Field(0.5, description="Probability of a horizontal flip.")
    color_jitter: NonNegativeFloat = Field(
        0.4, description="Strength of brightness, contrast and saturation jitter (0: off)."
    )
    randaugment: NonNegativeInt = Field(
        9, description="RandAugment magnitude, 0 to 10 (0: off). Two operations per image."
    )
    randaugment_std: NonNegativeFloat = Field(
        0.5, description="Standard deviation of the RandAugment magnitude."
    )
    random_erasing: Fraction = Field(
        0.25, description="Probability of random erasing (a box is filled with pixel noise)."
    )
    mixup: NonNegativeFloat = Field(
        0.8, description="Parameter of mixup's Beta distribution (0: off)."
    )
    cutmix: NonNegativeFloat = Field(
        1.0, description="Parameter of cutmix's Beta distribution (0: off)."
    )
    mixup_switch_prob: Fraction = Field(
        0.5, description="Probability of cutmix instead of mixup if both are on."
    )
    smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.1, description="Label smoothing (0: off)."
    )


class KeepCheckpoints(Section):
    """Which checkpoints of a stage stay; all others are deleted when a newer one is complete."""

    last: PositiveInt = Field(2, description="Number of newest checkpoints to keep.")
    every_steps: NonNegativeInt = Field(
        0, description="Also keep the first checkpoint of each interval of so many steps (0: none)."
    )
    best: bool = Field(
        False,
        description="Also keep the checkpoint with the best top-1, on the selection split with "
        "`keep: best`, else on the validation split.",
    )

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        # keep_checkpoints: 3 is short for keep_checkpoints: {last: 3}.
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return {"last": value} if is_number else value


class GuardConfig(Section):
    """What happens to steps whose loss or gradients are not finite or far too large."""

    window: PositiveInt = Field(
        100, description="Length of the stretch that the other keys look back on (steps)."
    )
    max_skipped: NonNegativeInt = Field(
        10,
        description="With more skipped steps than this in a window, training returns to a "
        "checkpoint from before and leaves out the images since then.",
    )
    max_rewinds: NonNegativeInt = Field(
        2,
        description="So many returns without a window of good steps between them; then the stage "
        "ends with a report.",
    )
    on_spike: Literal["warn", "skip", "rewind"] = Field(
        "warn",
        description="If the loss or the gradient norm jumps. 'warn': log it. 'skip': discard the "
        "update. 'rewind': return to a checkpoint and leave out the images since then.",
    )
    spike_score: PositiveFloat = Field(
        20.0,
        description="Distance from the median of the window that counts as a jump, in standard "
        "deviations (estimated by the median absolute deviation).",
    )


class TrainConfig(Section):
    """A training stage. `recipe` names a file in configs/recipe; keys of the job override it."""

    # Dataset and initial weights are inputs, compared by their digests; names and paths may change.
    data: Annotated[str, Rules(changes=NOTHING)] = Field(
        "",
        description="Name of the dataset in the job's `data`. Optional if there is only one.",
    )
    # Only a name: each value of the recipe is compared on its own.
    recipe: Annotated[str, Rules(changes=NOTHING, hparam=1)] = Field(
        "", description="Name of the file in configs/recipe that provides the other keys."
    )
    initial: Annotated[
        str,
        Rules(changes=NOTHING, rehearse_input=shrink.without_weights_file),
    ] = Field(
        "",
        alias="from",
        description="Source of the initial weights: a stage ('pretrain'), or a weights file or "
        "folder, also a published one. Its classifier is used if its classes are those of the "
        "images. Empty: random initialisation; a stage finetune after pretrain is left out.",
    )
    image_size: Annotated[PositiveInt, Rules(hparam=8, rehearse=shrink.small_image_size)] = Field(
        224,
        description="Side of the square training image (pixels): a multiple of the network's "
        "stride, which is 8 times `model.stem_stride` (32 with the published stem).",
    )
    epochs: Annotated[PositiveInt, Rules(hparam=4, rehearse=fixed(1))] = Field(
        description="Passes over the training split (epochs)."
    )
    # Not an early stop of a longer schedule: the cosine ends at this step.
    max_steps: Annotated[PositiveInt | None, Rules(rehearse=fixed(shrink.STEPS))] = Field(
        None,
        description="Stop after this many optimizer steps; the learning-rate schedule ends there "
        "too. Rehearsals use it.",
    )
    global_batch: Annotated[PositiveInt, Rules(hparam=3, rehearse=fixed(shrink.GLOBAL_BATCH))] = (
        Field(1024, description="Images per optimizer step, over all processes.")
    )
    # The split into micro-batches and the ZeRO stage decide memory and speed, not the gradients.
    micro_batch: Annotated[
        PositiveInt | Literal["auto"],
        Rules(changes=NOTHING, rehearse=shrink.small_micro_batch),
    ] = Field(
        "auto",
        description="Images per process in one forward and backward pass. Gradients accumulate "
        "until global_batch is reached. 'auto': on GPUs, what fits their memory by an estimate; on "
        "the CPU, global_batch / processes.",
    )
    order: Literal["global", "windowed"] = Field(
        "global",
        description="Shuffling within an epoch. 'global': all images. 'windowed', for cold "
        "storage: the order of the shards, and the images within groups of `window_shards`.",
    )
    window_shards: PositiveInt = Field(
        16,
        description="With order 'windowed': number of shards whose images are shuffled together. "
        "The next window is prefetched, so a cache needs room for twice as many.",
    )
    # Optimizer steps per epoch = images x repeats / global_batch.
    repeated_augmentation: Annotated[PositiveInt, Rules(rehearse=at_most(2))] = Field(
        1,
        description="Repeated augmentation: views of each image in a global batch. An epoch is "
        "longer by this factor: 300 epochs of timm with 3 repeats are 100 epochs here.",
    )
    balance: Fraction = Field(
        0.0,
        description="Class-balanced sampling: a class of n images is drawn in proportion to "
        "n^(1-balance). 0: as in the dataset, 0.5: square-root sampling, 1: all classes equally "
        "often.",
    )
    on_bad_sample: Annotated[Literal["stop", "replace"], Rules(changes=NOTHING)] = Field(
        "stop",
        description="If a prepared image cannot be read. 'stop': fail and report file and row. "
        "'replace': train on another image instead and count it (`data/replaced_samples`).",
    )
    intermediate_supervision: bool = Field(
        True,
        description="Intermediate supervision (compound loss of several columns). false: one "
        "plain head.",
    )
    precision: Annotated[Literal["bf16", "fp16", "fp32"], Rules(hparam=9)] = Field(
        "bf16",
        description="Precision of the network; master weights are always fp32. 'fp16' scales the "
        "loss by a factor that adapts to overflows.",
    )
    zero_stage: Annotated[int, Field(ge=0, le=3), Rules(changes=NOTHING, hparam=10)] = Field(
        2,
        description="DeepSpeed ZeRO stage: what the processes share out. 1: optimizer state. "
        "2: gradients too, which accumulate in fp32. 3: weights too. 0: nothing.",
    )
    # Where it lies changes no bit of it.
    offload_optimizer: Annotated[str, Rules(changes=NOTHING)] = Field(
        "none",
        description="Where master weights and optimizer state lie. 'none': on the device. 'cpu': "
        "in the host's memory. A folder, on a fast local disk: the state in files there, the "
        "weights in the host's memory.",
    )
    # Rates are stated for one batch size, so that a recipe holds for any number of GPUs.
    # Example: base_lr 1e-3 for 1024 images, global_batch 4096 -> 4e-3 at the peak.
    base_lr: Annotated[PositiveFloat, Rules(hparam=2)] = Field(
        description="Peak learning rate for a batch of `base_lr_batch` images. It is scaled "
        "linearly with global_batch."
    )
    base_lr_batch: PositiveInt = Field(
        1024,
        description="Batch size that `base_lr`, `min_lr` and `warmup_lr` refer to (images).",
    )
    min_lr: NonNegativeFloat = Field(
        1e-6,
        description="Learning rate at the end of the cosine schedule, scaled like `base_lr`.",
    )
    warmup_epochs: Annotated[NonNegativeFloat, Rules(rehearse=at_most(0.2))] = Field(
        0.0, description="Length of the linear warm-up (epochs)."
    )
    warmup_lr: NonNegativeFloat = Field(
        1e-5, description="Learning rate at the start of the warm-up, scaled like `base_lr`."
    )
    optimizer: Annotated[str, known_name(_OPTIMIZERS), Rules(hparam=11)] = Field(
        "adamw",
        description="Optimizer. "
        + " ".join(f"{name}: {known.description}" for name, known in registry.facts().items()),
        json_schema_extra={"enum": list(_OPTIMIZERS)},
    )
    weight_decay: Annotated[NonNegativeFloat, Rules(hparam=5)] = Field(
        0.05, description="Weight decay. 1-D parameters have none."
    )
    decay_alpha: bool = Field(
        True,
        description="Apply weight decay to the columns' alpha too, as the published code does.",
    )
    # An optimizer reads some of the next four. A check refuses the others if they are set.
    betas: tuple[BelowOne, BelowOne] = Field(
        (0.9, 0.999),
        description="Decay rates of the averages of gradients and of their squares"
        + _read_by("betas"),
    )
    eps: PositiveFloat = Field(
        1e-8,
        description="Added to the root of the averaged squares, against division by zero"
        + _read_by("eps"),
    )
    momentum: BelowOne = Field(
        0.9, description="Decay rate of the sum of gradients" + _read_by("momentum")
    )
    nesterov: bool = Field(
        False, description="Nesterov momentum: look one step ahead" + _read_by("nesterov")
    )
    clip_grad: NonNegativeFloat = Field(
        5.0, description="Gradient clipping: largest global gradient norm (0: off)."
    )
    # Example: with 0.9, parameters three layers below the head learn at 0.9^3 = 0.73 of its rate.
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0), Rules(hparam=6)] = Field(
        1.0, description="Layer-wise learning-rate decay factor (1: off)."
    )
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None, description="Stochastic depth rate of this stage; replaces the model's drop_path."
    )
    # Fine-tuning of the published models starts with an almost silent head (0.001).
    head_init_scale: PositiveFloat = Field(
        1.0, description="Factor on the classifier's initial weights."
    )
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0), Rules(hparam=7)] = Field(
        0.0, description="Decay of the exponential moving average of the weights (0: no EMA)."
    )
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="Augmentation.")
    # The remaining keys decide what is checked, evaluated, logged and saved, not what is computed;
    # only `keep` decides about the result.
    on_mismatch: Annotated[Literal["retry", "warn", "stop"], Rules(changes=NOTHING)] = Field(
        "retry",
        description="If inverting the columns shows that a step was computed wrongly. 'retry':"
        " repeat the step. 'warn': log it and continue. 'stop': fail the stage.",
    )
    # A run that the guard has ended must be able to resume with other limits.
    guard: Annotated[GuardConfig, Rules(changes=NOTHING)] = Field(
        default_factory=GuardConfig, description="Guard against bad steps."
    )
    eval_every_epochs: Annotated[PositiveFloat, Rules(changes=NOTHING, rehearse=fixed(1.0))] = (
        Field(
            1.0,
            description="Interval between evaluations (epochs). The last step is always evaluated.",
        )
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="Weights that the stage hands on and exports. 'last': those of the last step. "
        "'best': those of the evaluation with the best top-1 on the selection split of its "
        "dataset, of equal ones the latest. The dataset needs `selection_fraction` or a test "
        "split.",
    )
    preprocessing: Annotated[Preprocessing, Rules(changes=NOTHING)] = Field(
        "fast",
        description="How evaluation prepares images. 'fast': decodes JPEGs at a fraction of their "
        "size, resizes the short side to 1.143 x image_size, crops the centre. 'whole': as fast, "
        "with the largest crop. 'published': as published accuracies are measured, bit for bit as "
        "timm does: decodes in full, Pillow's bicubic filter; above 224 pixels the whole image is "
        "resized to the square.",
    )
    log_every_steps: Annotated[PositiveInt, Rules(changes=NOTHING, rehearse=fixed(1))] = Field(
        10, description="Interval between logged metrics (steps)."
    )
    profile_steps: Annotated[list[PositiveInt], Rules(changes=NOTHING)] = Field(
        [],
        description="Steps that torch.profiler records, from 1; Chrome traces in profiles/<stage>.",
    )
    checkpoint_every_steps: Annotated[
        PositiveInt | None, Rules(changes=NOTHING, rehearse=fixed(shrink.STEPS // 2))
    ] = Field(
        None, description="Interval between checkpoints (steps). null: one checkpoint per epoch."
    )
    keep_checkpoints: Annotated[KeepCheckpoints, Rules(changes=NOTHING)] = Field(
        KeepCheckpoints(),
        description="Which checkpoints stay. A number: so many of the newest.",
    )
