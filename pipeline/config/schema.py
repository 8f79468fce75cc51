"""The job file's schema: every key with its meaning, unit and default. The only definition of what a job may say.

A job is one YAML file. Values that are names of files in ``configs/<kind>/`` (``model: revcol_huge``,
``recipe: pretrain_22k``, ``cluster: local``) are replaced by that file's mapping before it is checked here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from pipeline.blocks import registry

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
DatasetName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
]  # also the name of a folder


def _known_block(name: str) -> str:
    if name not in registry.facts():
        raise ValueError(f"expected one of {', '.join(registry.facts())}")
    return name


Block = Annotated[
    str, AfterValidator(_known_block), Field(json_schema_extra={"enum": list(registry.facts())})
]
Levels = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are immutable once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """A reversible column network (Cai et al., ICLR 2023)."""

    channels: Levels = Field(
        description="Widths C0..C3 of the four levels, finest (stride 4) first."
    )
    depths: Levels = Field(description="Blocks at each of the four levels of one column.")
    columns: PositiveInt = Field(description="Number of columns T.")
    huge: bool = Field(
        False, description="RevCol-H wiring: level 0 also takes the previous column's level 3."
    )
    block: Block | tuple[Block, Block, Block, Block] = Field(
        "convnext", description="Kind of block, for all levels or each."
    )
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0,
        description="Stochastic depth: rate of the last block of a column; earlier blocks scale linearly from 0.",
    )
    activations: Literal["exact", "stored", "checkpointed"] = Field(
        "exact",
        description="How the backward pass gets its activations: 'exact' inverts the columns bit for bit (O(1) memory in "
        "columns), 'stored' keeps them (plain autograd), 'checkpointed' keeps each column's maps and computes the rest again.",
    )
    stored_columns: NonNegativeInt | Literal["auto"] = Field(
        0,
        description="With 'exact': the last columns that keep their graphs (saves time); 'auto': as many as fit the memory.",
    )
    compile: bool = Field(
        False,
        description="torch.compile of each level's function: a minute or more at the start, faster steps on a GPU.",
    )
    fraction_bits: Annotated[int, Field(ge=8, le=24)] = Field(
        18,
        description="With 'exact': resolution 2^-bits and range 2^(31-bits) of the residual stream (bits).",
    )


class ClusterConfig(Section):
    """Where the processes run."""

    kind: Literal["local"] = Field(
        "local", description="'local': a Ray of our own on this machine."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="'auto': cuda where there is one, else cpu."
    )
    processes: PositiveInt | Literal["auto"] = Field(
        "auto", description="Training processes (world size). 'auto': one a GPU, or two on the CPU."
    )
    threads: PositiveInt | Literal["auto"] = Field(
        "auto", description="Compute threads of each process. 'auto': cores / processes."
    )
    loader_threads: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Image decoding threads of each process. 'auto': cores / processes, at most 16.",
    )
    prefetch_mib: PositiveInt = Field(
        512,
        description="Most memory of each process for batches read ahead (MiB); two are, even where they need more.",
    )


class SyntheticConfig(Section):
    """Made-up images in the layout of the real set, for a first run and for rehearsals."""

    classes: PositiveInt = Field(
        24, description="Number of classes that have images (drawn from the class list)."
    )
    images_per_class: PositiveInt = Field(60, description="Training images of each class.")
    validation_per_class: PositiveInt = Field(
        10, description="Validation images of each class, disjoint from training."
    )
    min_size: PositiveInt = Field(48, description="Shortest side of the smallest image (pixels).")
    max_size: PositiveInt = Field(128, description="Longest side of the largest image (pixels).")
    corrupt_fraction: Fraction = Field(
        0.01, description="Share of extra bad files (truncated, empty, no image, duplicate)."
    )
    seed: Seed = Field(
        0, description="Seed of the generated images; two sets of different seeds are disjoint."
    )


class DatasetConfig(Section):
    """One labelled image set and how it is prepared into shards."""

    root: str = Field(
        "",
        description="Folder (or fsspec URL) of the source; with layout 'huggingface' the dataset's path.",
    )
    layout: Literal["class_tars", "imagenet_tars", "class_folders", "huggingface", "auto"] = Field(
        "auto",
        description="class_tars: <class>.tar files, or train/ and val|validation|test/ folders of them; imagenet_tars: "
        "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the validation labels; class_folders: a folder a class, or "
        "train/ and val|validation|test/ of them; huggingface: anything `datasets.load_dataset` reads; auto: looks.",
    )
    classes: str = Field(
        "auto",
        description="Class order: a list in configs/classes (fall11_21841, google_21843, imagenet1k), a file "
        "of one class a line, or 'auto': the root's synsets.txt, else the sorted names of the source.",
    )
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.1,
        description="Share held out by content hash when the source has no validation split of its own.",
    )
    image_column: str = Field(
        "image", description="Column of the images, for layout 'huggingface'."
    )
    label_column: str = Field(
        "label", description="Column of the labels, for layout 'huggingface'."
    )
    short_side: PositiveInt | Literal["keep"] = Field(
        "keep",
        description="Images with a longer short side are scaled down to it (pixels); 'keep': bytes as they are.",
    )
    jpeg_quality: Annotated[int, Field(ge=50, le=100)] = Field(
        92, description="JPEG quality of re-encoded images (percent)."
    )
    min_side: PositiveInt = Field(
        32, description="Images with a shorter side are quarantined (pixels)."
    )
    max_pixels: PositiveInt = Field(
        178_956_970, description="Images of more pixels are quarantined undecoded."
    )
    max_rejected: Fraction = Field(
        0.01, description="Share of rejected images above which preparation stops."
    )
    shard_rows: PositiveInt = Field(8192, description="Images a shard, about.")
    synthetic: SyntheticConfig | None = Field(
        None, description="Make the source up instead of reading `root`."
    )


class AugmentConfig(Section):
    """Training-time augmentation; each random choice is a function of (seed, epoch, sample)."""

    crop_scale: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.08, 1.0), description="Area of the random crop (share)."
    )
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.75, 1.3333), description="Aspect ratio of the random crop."
    )
    flip: Fraction = Field(0.5, description="Probability of a horizontal flip.")
    color_jitter: NonNegativeFloat = Field(
        0.4, description="Strength of brightness, contrast and saturation jitter."
    )
    randaugment: NonNegativeInt = Field(
        9, description="RandAugment magnitude (0 to 10; 0 turns it off), two operations."
    )
    randaugment_std: NonNegativeFloat = Field(
        0.5, description="Standard deviation of RandAugment's magnitude."
    )
    random_erasing: Fraction = Field(
        0.25, description="Probability of random erasing (a box of pixel noise)."
    )
    mixup: NonNegativeFloat = Field(0.8, description="Beta parameter of mixup (0 turns it off).")
    cutmix: NonNegativeFloat = Field(1.0, description="Beta parameter of cutmix (0 turns it off).")
    mixup_switch_prob: Fraction = Field(0.5, description="Share of cutmix where both are on.")
    smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.1, description="Label smoothing.")


class TrainConfig(Section):
    """A training stage: `recipe` names a file in configs/recipe, every key here can be overridden in the job."""

    data: str = Field(
        "",
        description="Name of the dataset in the job's `data`; may be left out where there is only one.",
    )
    recipe: str = Field(
        "", description="Name of the file in configs/recipe that the other keys come from."
    )
    initial: str = Field(
        "",
        alias="from",
        description="Stage to take the weights from ('pretrain'), or a .safetensors file.",
    )
    image_size: PositiveInt = Field(
        224, description="Side of the square training image (pixels, a multiple of 32)."
    )
    epochs: PositiveInt = Field(description="Passes over the training split.")
    max_steps: PositiveInt | None = Field(
        None, description="Stop after so many optimizer steps of the schedule (rehearsals)."
    )
    global_batch: PositiveInt = Field(
        1024, description="Images an optimizer step, over all processes."
    )
    micro_batch: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Images a process computes at once; 'auto': global_batch / processes. The rest is accumulation.",
    )
    order: Literal["global", "windowed"] = Field(
        "global",
        description="Shuffling of an epoch: 'global' over all images; 'windowed', for cold storage: the shards, and the images "
        "within `window_shards` of them.",
    )
    window_shards: PositiveInt = Field(
        16,
        description="With order 'windowed': shards whose images are mixed at a time. They and the next window's are fetched: a "
        "cache needs room for twice as many.",
    )
    repeated_augmentation: PositiveInt = Field(
        1,
        description="Repeated augmentation: views of each image in a global batch. An epoch is so many times as long: 300 "
        "epochs of timm with 3 repeats are 100 here.",
    )
    balance: Fraction = Field(
        0.0,
        description="Class-balanced sampling: a class of n images is shown in proportion to n^(1-balance). 0: as the data is, "
        "0.5: square-root sampling, 1: every class equally often.",
    )
    on_bad_sample: Literal["stop", "replace"] = Field(
        "stop",
        description="When a prepared image cannot be read: stop, naming file and row, or train on another image in its place "
        "and count it (`data/replaced_samples`).",
    )
    intermediate_supervision: bool = Field(
        True, description="Intermediate supervision (compound loss); false: one plain head."
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Arithmetic of the network; masters are always fp32."
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(1, description="DeepSpeed ZeRO stage.")
    base_lr: PositiveFloat = Field(
        description="Peak learning rate for `base_lr_batch` images a step; scaled linearly with global_batch."
    )
    base_lr_batch: PositiveInt = Field(
        1024,
        description="Batch size that `base_lr`, `min_lr` and `warmup_lr` are stated for (images).",
    )
    min_lr: NonNegativeFloat = Field(
        1e-6, description="Final learning rate of the cosine, scaled like `base_lr`."
    )
    warmup_epochs: NonNegativeFloat = Field(0.0, description="Linear warm-up (epochs).")
    warmup_lr: NonNegativeFloat = Field(
        1e-5, description="Learning rate at the start of the warm-up, scaled like `base_lr`."
    )
    weight_decay: NonNegativeFloat = Field(
        0.05, description="AdamW weight decay; 0 for 1-D parameters."
    )
    decay_alpha: bool = Field(
        True, description="Decay the columns' alpha too, as the published code does."
    )
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="AdamW betas.")
    eps: PositiveFloat = Field(1e-8, description="AdamW epsilon.")
    clip_grad: NonNegativeFloat = Field(
        5.0, description="Gradient norm above which gradients are scaled down (0: never)."
    )
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="Learning-rate factor a layer of depth."
    )
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None, description="Overrides the model's drop_path."
    )
    head_init_scale: PositiveFloat = Field(
        1.0, description="Factor on the classifier's initial weights."
    )
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Decay of the weights' moving average (0: none)."
    )
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="Augmentation.")
    on_mismatch: Literal["retry", "warn", "stop"] = Field(
        "retry",
        description="When reversal proves a step's arithmetic wrong: repeat the step, only report it, or stop the stage.",
    )
    eval_every_epochs: PositiveFloat = Field(
        1.0, description="Evaluate every so many epochs, and at the end."
    )
    eval_resize: PositiveFloat = Field(
        1.143, description="Evaluation scales the short side to this times image_size."
    )
    log_every_steps: PositiveInt = Field(10, description="Metrics every so many steps.")
    checkpoint_every_steps: PositiveInt | None = Field(
        None, description="Checkpoint every so many steps; none: once an epoch."
    )
    keep_checkpoints: PositiveInt = Field(2, description="Checkpoints kept (the newest).")


class PrepareStage(Section):
    """Sources -> checked, resized, shuffled Parquet shards."""

    data: list[str] = Field(
        default_factory=list, description="Datasets to prepare; empty: all that the job names."
    )


class EvaluateStage(Section):
    """Top-1 and top-5 on every validation image exactly once."""

    data: str = Field("", description="Dataset; default: that of the `from` stage.")
    initial: str = Field(
        "finetune",
        alias="from",
        description="Training stage whose weights (EMA if it has one) to evaluate.",
    )
    image_size: PositiveInt | None = Field(
        None, description="Side of the image (pixels); default: that of the `from` stage."
    )
    batch: PositiveInt = Field(64, description="Images a process evaluates at once.")


class ExportStage(Section):
    """Weights, description, preprocessing and class names for use without this pipeline."""

    initial: str = Field(
        "finetune",
        alias="from",
        description="Training stage whose weights (EMA if it has one) to export.",
    )


class Stages(Section):
    """The stages of a job; they run in this order."""

    prepare: PrepareStage | None = Field(None, description="Prepare the data.")
    pretrain: TrainConfig | None = Field(None, description="Pretraining.")
    finetune: TrainConfig | None = Field(None, description="Fine-tuning.")
    evaluate: EvaluateStage | None = Field(None, description="Final evaluation.")
    export: ExportStage | None = Field(None, description="Export.")


class Job(Section):
    """One run from data to exported weights."""

    name: Annotated[
        str, Field(min_length=1, max_length=64, pattern=r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*$")
    ] = Field(
        description="Name; the run's directory is runs/<name>. No '/', '\\' or control characters, no '.' first."
    )
    seed: Seed = Field(0, description="Seed of every random choice.")
    model: ModelConfig = Field(description="The network, or the name of a file in configs/model.")
    cluster: ClusterConfig = Field(
        default_factory=ClusterConfig, description="Where it runs, or a name in configs/cluster."
    )
    data: dict[DatasetName, DatasetConfig] = Field(
        description="Datasets by name; one alone may be written without a name."
    )
    stages: Stages = Field(description="What to do.")
