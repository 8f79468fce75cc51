"""The job's ``data`` section: image sources and their preparation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from pipeline.config.schema.rules import NOTHING, Rules
from pipeline.config.schema.section import Fraction, Section, Seed, known_name
from pipeline.config.schema.shrink import (
    at_most,
    fixed,
    held_out_for_selection,
    readable_layout,
    synthetic_source,
)
from pipeline.sources import registry

DatasetName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
]  # also the name of a folder


_LAYOUTS = [*registry.descriptions(), "auto"]


class SyntheticConfig(Section):
    """Synthetic images in the layout of a real source, for a first run and for rehearsals."""

    first_keys: ClassVar[tuple[str, ...]] = (
        "classes",
        "images_per_class",
        "validation_per_class",
        "min_size",
        "max_size",
        "corrupt_fraction",
        "seed",
    )

    # Small defaults: a first run should take minutes.
    classes: PositiveInt = Field(
        24, description="Number of classes that have images, drawn from the class list."
    )
    images_per_class: PositiveInt = Field(60, description="Training images per class.")
    validation_per_class: PositiveInt = Field(
        10, description="Validation images per class, disjoint from the training images."
    )
    min_size: PositiveInt = Field(48, description="Shortest side of the smallest image (pixels).")
    max_size: PositiveInt = Field(128, description="Longest side of the largest image (pixels).")
    corrupt_fraction: Fraction = Field(
        0.01,
        description="Corrupt files to add, relative to the number of images (share): truncated, "
        "empty, not an image, or a duplicate.",
    )
    seed: Seed = Field(
        0,
        description="Seed of the synthetic images. Datasets with different seeds have no image in "
        "common.",
    )


class SplitsConfig(Section):
    """The splits of a source by name."""

    train: str = Field(
        "",
        description="Folder of the training images, relative to `root`, or name of a split. "
        "Without `validation`, images are held out of it.",
    )
    validation: str = Field(
        "", description="Folder of the validation images, relative to `root`, or name of a split."
    )
    test: str = Field(
        "",
        description="Folder of the test images, relative to `root`, or name of a split. Their "
        "accuracy is the result of the run.",
    )


class DatasetConfig(Section):
    """A labelled image dataset and how it is prepared into shards."""

    first_keys: ClassVar[tuple[str, ...]] = (
        "validation_fraction",
        "image_column",
        "label_column",
        "short_side",
        "jpeg_quality",
        "min_side",
        "max_pixels",
        "shard_rows",
    )

    # The content of the source is an input of preparation, compared by its digest: the source
    # itself may move.
    root: Annotated[
        str,
        Rules(changes=NOTHING, rehearse_input=fixed("")),
    ] = Field(
        "",
        description="Folder or fsspec URL of the source; with layout 'huggingface', the path of "
        "the dataset.",
    )
    # The dataset that it names is an input of training, compared by its fingerprint.
    prepared: Annotated[str, Rules(changes=NOTHING, rehearse_input=fixed(""))] = Field(
        "",
        description="Folder or fsspec URL of a dataset that was prepared before, used instead of "
        "`root`. Shards behind a URL are read through `cluster.shard_cache`.",
    )
    layout: Annotated[
        str,
        known_name(_LAYOUTS),
        Rules(rehearse_input=readable_layout),
    ] = Field(
        "auto",
        description="Layout of the source. "
        + " ".join(f"{name}: {text}" for name, text in registry.descriptions().items())
        + " auto: detected from the source.",
        json_schema_extra={"enum": list(_LAYOUTS)},
    )
    splits: Annotated[
        SplitsConfig | Literal["none"] | None,
        Rules(rehearse_input=fixed(None)),
    ] = Field(
        None,
        description="Folders (relative to `root`; '.' is the root itself) or split names of the "
        "source that become train, validation and test. 'none': folders that are called like "
        "splits are classes. null: by their usual names, such as train, val and test.",
    )
    classes: str = Field(
        "auto",
        description="Class order: a list in configs/classes (fall11_21841, google_21843, "
        "imagenet1k), a file with one class per line, or 'auto': synsets.txt of the source if it "
        "exists, otherwise the sorted class names of the source.",
    )
    # Splits and shards are made from the units, and the size limits are applied to them again, so
    # these keys may change while a preparation is unfinished.
    validation_fraction: Annotated[Fraction, Rules(keeps_work=True)] = Field(
        0.1,
        description="Images to hold out for validation (share), selected by content hash. Used "
        "only if the source has no validation split. 1: all images, to evaluate and not to train.",
    )
    selection_fraction: Annotated[
        float, Field(ge=0.0, lt=1.0), Rules(keeps_work=True, rehearse_input=held_out_for_selection)
    ] = Field(
        0.0,
        description="Training images to hold out for choosing the best checkpoint (share), "
        "selected by content hash; every class keeps one for training. Not used if the source has "
        "a test split: then the validation split chooses.",
    )
    image_column: str = Field(
        "image", description="Name of the image column, for layout 'huggingface'."
    )
    label_column: str = Field(
        "label", description="Name of the label column, for layout 'huggingface'."
    )
    # Preparation accepts a dataset of a version that had no such key, too (``changed_source``).
    exif_orientation: Annotated[
        Literal["apply", "ignore"], Rules(accepts_missing=True, rehearse_input=fixed("ignore"))
    ] = Field(
        "ignore",
        description="'apply': images that a camera stored rotated are turned upright and encoded "
        "again. 'ignore': pixels are used as stored, as the published recipes do.",
    )
    short_side: PositiveInt | Literal["keep"] = Field(
        "keep",
        description="Target for the short side (pixels): larger images are scaled down to it. "
        "'keep': image bytes are stored unchanged.",
    )
    jpeg_quality: Annotated[int, Field(ge=50, le=100)] = Field(
        92, description="JPEG quality of re-encoded images (percent)."
    )
    min_side: Annotated[PositiveInt, Rules(keeps_work=True, rehearse_input=at_most(64))] = Field(
        32, description="Images with a shorter side are quarantined (pixels)."
    )
    # Pillow's own limit against decompression bombs: 2 x 1024^3 / 4 / 3 bytes.
    max_pixels: Annotated[PositiveInt, Rules(keeps_work=True)] = Field(
        178_956_970,
        description="Images with more pixels (width x height) are quarantined without decoding.",
    )
    # Synthetic sources contain corrupt files on purpose, hence the higher limit in a rehearsal.
    # It decides whether preparation may finish, not what it writes.
    max_rejected: Annotated[Fraction, Rules(changes=NOTHING, rehearse_input=fixed(0.2))] = Field(
        0.01,
        description="Largest acceptable share of rejected images (share). Preparation fails "
        "above it.",
    )
    shard_rows: Annotated[PositiveInt, Rules(keeps_work=True, rehearse_input=fixed(64))] = Field(
        8192, description="Approximate number of images per shard."
    )
    synthetic: Annotated[SyntheticConfig | None, Rules(rehearse_input=synthetic_source)] = Field(
        None, description="Generate synthetic images instead of reading `root`."
    )
