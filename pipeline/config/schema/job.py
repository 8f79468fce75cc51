"""The job file: its stages and the job itself.

A job is one YAML file. Values that name files in ``configs/<kind>/`` (``model: revcol_huge``,
``recipe: pretrain_22k``, ``cluster: local``) are replaced by the content of that file before the
job is validated against this schema.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from pipeline.config.export_formats import FORMATS
from pipeline.config.schema.cluster import ClusterConfig
from pipeline.config.schema.data import DatasetConfig, DatasetName
from pipeline.config.schema.model import ModelConfig
from pipeline.config.schema.rules import NOTHING, TRAINING_RESULTS, Rules
from pipeline.config.schema.section import Preprocessing, Section, Seed, known_name
from pipeline.config.schema.shrink import LONGEST_NAME, fixed, small_image_size, with_suffix
from pipeline.config.schema.train import TrainConfig

_FORMATS = list(FORMATS)


class PrepareStage(Section):
    """Converts image sources to validated, resized and shuffled Parquet shards."""

    data: list[str] = Field(
        default_factory=list,
        description="Names of the datasets to prepare. Empty: all datasets of the job.",
    )


class EvaluateStage(Section):
    """Computes top-1 and top-5 accuracy on the test split, or on validation if there is none.

    Every image counts exactly once.
    """

    # Dataset and weights are inputs, compared by their digests; where they lie does not matter.
    data: Annotated[str, Rules(changes=NOTHING)] = Field(
        "", description="Name of the dataset. Empty: the dataset of the stage in `from`."
    )
    initial: Annotated[str, Rules(changes=NOTHING)] = Field(
        "finetune",
        alias="from",
        description="Weights to evaluate: a training stage (its EMA weights if it has any), the "
        "folder of an exported model or of a run, or a weights file, also a published one.",
    )
    # Optional: weights are best evaluated at the size they were trained at.
    image_size: Annotated[PositiveInt | None, Rules(rehearse=small_image_size)] = Field(
        None,
        description="Side of the square evaluation image (pixels). null: that of the stage in "
        "`from`.",
    )
    preprocessing: Preprocessing | None = Field(
        None,
        description="How images are prepared: published, fast or whole, as explained for a "
        "training stage. null: as the stage in `from`; 'published' for published weights.",
    )
    batch: Annotated[PositiveInt, Rules(changes=NOTHING)] = Field(
        64, description="Images per process in one forward pass."
    )


class ExportStage(Section):
    """Writes weights, model description, preprocessing and class names for use elsewhere."""

    initial: Annotated[str, Rules(changes=NOTHING)] = Field(
        "finetune",
        alias="from",
        description="Weights to export: a training stage (its EMA weights if it has any) or a "
        "weights file, also a published one.",
    )

    formats: list[
        Annotated[str, known_name(_FORMATS), Field(json_schema_extra={"enum": _FORMATS})]
    ] = Field(
        ["native", "published"],
        description="What is written beside the weights. "
        + " ".join(f"{name}: {facts.title}." for name, facts in FORMATS.items()),
    )
    hub_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Precision of the weights in the folder of the format 'hub'; bf16 halves it.",
    )


class Stages(Section):
    """The stages of a job; they run in this order."""

    # The settings of a stage change its own result. What it takes over from another stage reaches
    # it as an input.
    prepare: Annotated[PrepareStage | None, Rules(changes=("prepare",))] = Field(
        None, description="Data preparation."
    )
    pretrain: Annotated[TrainConfig | None, Rules(changes=("pretrain",))] = Field(
        None, description="Pretraining."
    )
    finetune: Annotated[TrainConfig | None, Rules(changes=("finetune",))] = Field(
        None, description="Fine-tuning."
    )
    evaluate: Annotated[EvaluateStage | None, Rules(changes=("evaluate",))] = Field(
        None, description="Final evaluation."
    )
    export: Annotated[ExportStage | None, Rules(changes=("export",))] = Field(
        None, description="Export."
    )


class CheckpointsConfig(Section):
    """Where checkpoints go besides the run directory."""

    # A rehearsal leaves nothing elsewhere.
    mirror: Annotated[str, Rules(rehearse=fixed(""))] = Field(
        "",
        description="Folder or URL (fsspec) for a copy of the run: checkpoints, logs and results, "
        "uploaded in the background. A run in an empty directory resumes from it. Empty: none.",
    )


# The job's name becomes runs/<name>, so it must be a folder name on every system: no separators,
# no control characters, not hidden.
_JobName = Annotated[
    str,
    Field(min_length=1, max_length=LONGEST_NAME, pattern=r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*$"),
]


class Job(Section):
    """One run from data to exported weights."""

    name: Annotated[_JobName, Rules(changes=NOTHING, rehearse=with_suffix)] = Field(
        description="Name of the job; its run directory is runs/<name>. It contains no '/', '\\' "
        "or control character and does not start with '.'. '{folder}' in it stands for the last "
        "part of `root` of the only dataset."
    )
    # One seed for initial weights, order and augmentation. Each random choice is a function of it
    # and of what it decides (epoch, sample), so that a resumed run repeats the same choices.
    seed: Annotated[Seed, Rules(changes=("prepare", *TRAINING_RESULTS))] = Field(
        0, description="Seed of all random choices."
    )
    model: Annotated[ModelConfig, Rules(changes=(*TRAINING_RESULTS, "evaluate", "export"))] = Field(
        description="The network: a mapping, or the name of a file in configs/model. A job that "
        "only evaluates takes it from the trained model. 'auto': that of the weights that "
        "`finetune` starts from, or without any revcol_own_images."
    )
    # A run may move to another machine: how many processes compute does not change the result.
    cluster: Annotated[ClusterConfig, Rules(changes=NOTHING)] = Field(
        default_factory=ClusterConfig,
        description="Where the job runs: a mapping, or the name of a file in configs/cluster.",
    )
    # Training depends on the prepared dataset, an input, and not on how it came about.
    data: Annotated[dict[DatasetName, DatasetConfig], Rules(changes=("prepare",))] = Field(
        description="Datasets by name. A single dataset may be written without a name."
    )
    checkpoints: Annotated[CheckpointsConfig, Rules(changes=NOTHING)] = Field(
        default_factory=CheckpointsConfig, description="Copies of the run elsewhere."
    )
    stages: Stages = Field(description="The stages to run.")
