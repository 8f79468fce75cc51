"""Images of a dataset, their bytes, and the cores that decode them, before any of them is read."""

from __future__ import annotations

from pipeline.config.job_queries import dataset_name
from pipeline.config.schema import DatasetConfig, Job

# Training images of public datasets, by the name of their class list.
KNOWN_IMAGES = {"imagenet1k": 1_281_167, "fall11_21841": 14_197_122}
# Measured on ImageNet, of one core: images per second that are decoded, cropped and augmented by
# the whole recipe, from the original files and from images of short side 256.
ORIGINALS_PER_CORE = 560.0
SCALED_PER_CORE = 1030.0
SCALED_SIDE = 256
ORIGINAL_BYTES = 110e3  # of a file of ImageNet
SCALED_BYTES = 39e3  # of the same at short side 256


def training_images(job: Job, stage: str) -> int | None:
    """Training images of a stage's dataset, as far as the job tells; None if it does not."""
    dataset = job.data.get(dataset_name(job, stage))
    if dataset is None:
        return None
    if dataset.synthetic is not None:
        return dataset.synthetic.classes * dataset.synthetic.images_per_class
    # A folder of one's own is counted by preparation only.
    known = KNOWN_IMAGES.get(dataset.classes)
    if known is None or dataset.classes == "imagenet1k":  # it has a validation split of its own
        return known
    return round(known * (1 - dataset.validation_fraction))


def dataset_bytes(dataset: DatasetConfig, images: int) -> float:
    """Bytes of the prepared shards of that many photographs."""
    if dataset.short_side == "keep":
        return images * ORIGINAL_BYTES
    return images * min(ORIGINAL_BYTES, SCALED_BYTES * (dataset.short_side / SCALED_SIDE) ** 2)


def loader_cores(dataset: DatasetConfig, images_per_s: float) -> float:
    """Cores that the loader needs to keep up with the devices."""
    if dataset.short_side == "keep":
        return images_per_s / ORIGINALS_PER_CORE
    per_core = SCALED_PER_CORE * (SCALED_SIDE / dataset.short_side) ** 2
    return images_per_s / max(per_core, ORIGINALS_PER_CORE)
