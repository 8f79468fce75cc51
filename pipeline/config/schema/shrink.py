"""How ``--rehearse`` shrinks values: the functions that keys name in ``Rules(rehearse=...)``.

A rehearsal runs the user's own job in minutes on two CPU processes. Widths, images and steps
shrink; wiring, depths, number of columns, recipes, precision, ZeRO stage and the order of stages
stay, so that whatever would fail after hours on a cluster fails after seconds on a laptop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.checkpoint.weights_source import is_weights_file

SUFFIX = "-rehearsal"
LONGEST_NAME = 64  # characters; of a job, suffix included
WIDTH = 12  # channels of the finest level
PROCESSES = 2
GLOBAL_BATCH = 16
MICRO_BATCH = 4  # 16 = 2 processes x 4 images x 2 micro-batches: accumulation is rehearsed too
STEPS = 8
IMAGE_SIZES = (64, 96, 128, 160)  # replace the job's different sizes, ascending (pixels)
CLASSES = 24
SYNTHETIC_LAYOUTS = ("class_tars", "class_folders", "imagenet_tars")  # that can be generated
IMAGES_PER_CLASS = 12
VALIDATION_PER_CLASS = 4
SELECTION_FRACTION = 0.1


@dataclass(frozen=True, kw_only=True)
class RehearsalContext:
    """Facts of the whole job that shrinking one value needs.

    ``image_sizes``: image size of the job -> of the rehearsal (see ``small_image_sizes``).
    ``class_count``: length of the dataset's class list; None if the source decides.
    ``dataset_number``: position of the dataset in the job's ``data``, from 0.
    ``keeps_best``: a stage of the job keeps its best weights.
    ``section``: the values beside the key, by name.
    """

    image_sizes: Mapping[int, int]
    class_count: int | None = None
    dataset_number: int = 0
    keeps_best: bool = False
    section: Mapping[str, object] = field(default_factory=dict)


# From a key's value in the job to its value in the rehearsal, both as plain JSON values.
Shrink = Callable[[Any, RehearsalContext], object]


def fixed(value: object) -> Shrink:
    """The same value whatever the job says."""
    return lambda _value, _context: value


def at_most(limit: float) -> Shrink:
    """The job's value, or ``limit`` if that is smaller."""

    def shrink(value: float, _context: RehearsalContext) -> float:
        return min(value, limit)

    return shrink


def with_suffix(name: str, _context: RehearsalContext) -> str:
    """A name of its own, so that a rehearsal never touches the real run directory."""
    return name[: LONGEST_NAME - len(SUFFIX)] + SUFFIX


def narrow(channels: Iterable[int], _context: RehearsalContext) -> list[int]:
    """Widths in the same proportions, the first at most WIDTH; multiples of 4.

    Example: [72, 144, 288, 576] is scaled by 12/72 to [12, 24, 48, 96].
    """
    widths = list(channels)
    # Proportions stay, so that every down-sampling between levels still changes the width.
    scale = min(1.0, WIDTH / widths[0])
    return [max(4, round(width * scale / 4) * 4) for width in widths]


def small_micro_batch(_value: object, context: RehearsalContext) -> int:
    """MICRO_BATCH; all images of a process if the stage cannot accumulate (ZeRO 1 in 16 bits)."""
    section = context.section
    if section.get("zero_stage") == 1 and section.get("precision") != "fp32":
        return GLOBAL_BATCH // PROCESSES
    return MICRO_BATCH


def small_image_size(size: int | None, context: RehearsalContext) -> int | None:
    """The size that stands for ``size`` in this rehearsal; None stays None."""
    return None if size is None else context.image_sizes[size]


def small_image_sizes(sizes: Iterable[int]) -> dict[int, int]:
    """Small sizes in the same order as the job's; equal ones stay equal, none grows.

    Example: pretraining at 224, fine-tuning and evaluation at 384 -> {224: 64, 384: 96}.
    """
    ascending = sorted(set(sizes))
    last = len(IMAGE_SIZES) - 1
    # Distinct sizes stay distinct, so that a change of resolution between stages is rehearsed too.
    return {size: min(size, IMAGE_SIZES[min(i, last)]) for i, size in enumerate(ascending)}


def readable_layout(layout: str, _context: RehearsalContext) -> str:
    """Layouts that synthetic images cannot have become class tars."""
    return layout if layout in SYNTHETIC_LAYOUTS else SYNTHETIC_LAYOUTS[0]


def synthetic_source(_value: object, context: RehearsalContext) -> dict[str, object]:
    """The ``synthetic`` section that replaces a dataset's real images."""
    listed = CLASSES if context.class_count is None else context.class_count
    return {
        "classes": min(CLASSES, listed),
        "images_per_class": IMAGES_PER_CLASS,
        "validation_per_class": VALIDATION_PER_CLASS,
        "min_size": 64,
        "max_size": 128,
        "corrupt_fraction": 0.02,  # the quarantine is rehearsed too
        "seed": 1 + context.dataset_number,  # datasets of one job differ
    }


def held_out_for_selection(fraction: float, context: RehearsalContext) -> float:
    """A share that is held out where the real job may select on a test split.

    Synthetic sources have none.
    """
    return fraction or (SELECTION_FRACTION if context.keeps_best else 0.0)


def without_weights_file(source: str, _context: RehearsalContext) -> str:
    """A stage name stays; a weights file has the real width, so the rehearsal does without."""
    return "" if is_weights_file(source) else source
