"""The images of ``bench small``: a small part of a folder of classes, the same for every network.

<target>/train/<class>/<file>    the first images of each class, by name
<target>/test/<class>/<file>     for the accuracy that is reported
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import DatasetConfig, SyntheticConfig
from pipeline.data.augment import EvalTransform
from pipeline.data.decode import Image
from pipeline.errors import DataError
from pipeline.sources.member import Member
from pipeline.sources.reader import members
from pipeline.sources.survey import survey
from pipeline.sources.units import Survey
from pipeline.synthetic.generate import finish_source, plan_files, write_file

TRAIN = "train"
TEST = "test"


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Which part of a source is used: the first classes by name, and images of each by name."""

    classes: int
    images_per_class: int
    test_images_per_class: int


def write_synthetic(target: Path, subset: Subset) -> None:
    """Write class folders of small synthetic images, for use without a data set."""
    config = DatasetConfig(
        layout="class_folders",
        synthetic=SyntheticConfig(
            classes=subset.classes,
            images_per_class=subset.images_per_class,
            validation_per_class=subset.test_images_per_class,
            min_size=32,
            max_size=48,
            corrupt_fraction=0,
        ),
    )
    for file in plan_files(config, target):
        write_file(file)
    finish_source(config, target)


def write_subset(source: str, target: Path, subset: Subset) -> dict[str, int]:
    """Copy the selected images of ``source`` into class folders below ``target``.

    Args:
        source: folder of class folders or class tars below train/ and test/ (or val/).

    Returns:
        Number of images per split.

    Raises:
        DataError: the source has no such splits, or fewer classes than are wanted.
    """
    config = DatasetConfig(root=source)
    surveyed = survey(config)
    class_ids = [class_id for class_id, _ in surveyed.classes]
    chosen = sorted(class_ids)[: subset.classes]
    if len(chosen) < subset.classes:
        raise DataError(
            f"has {len(chosen)} classes, {subset.classes} are wanted",
            place=source,
            remedy=f"--classes {len(chosen)}",
        )
    splits = {str(unit.split) for unit in surveyed.units}
    # The figure is of the test images where there are any, otherwise of the validation images.
    reported = next((name for name in ("test", "validation") if name in splits), None)
    if "train" not in splits or reported is None:
        raise DataError(
            "has no separate test images",
            place=source,
            remedy="give a folder with train/ and test/, each with one folder or tar per class",
        )
    counts: dict[str, int] = {}
    for split, folder, most in (
        ("train", TRAIN, subset.images_per_class),
        (reported, TEST, subset.test_images_per_class),
    ):
        by_class: dict[str, list[Member]] = defaultdict(list)
        for member in _readable(surveyed, split, config, chosen):
            by_class[class_ids[member.label]].append(member)
        for class_id in chosen:
            # By name, because archives list their members in any order.
            first = heapq.nsmallest(most, by_class[class_id], key=lambda member: member.key)
            _write_class(target / folder / class_id, first)
            counts[folder] = counts.get(folder, 0) + len(first)
    return counts


def _readable(
    surveyed: Survey, split: str, config: DatasetConfig, chosen: list[str]
) -> Iterator[Member]:
    """The files of the chosen classes in a split, except those that the reader rejects."""
    labels = {class_id: label for label, (class_id, _) in enumerate(surveyed.classes)}
    wanted = {labels[class_id] for class_id in chosen}
    parts = [part for unit in surveyed.units if unit.split == split for part in unit.parts]
    for part in parts:
        # Nothing of another class is read. A part of several classes has the label -1.
        if part.label >= 0 and part.label not in wanted:
            continue
        for member in members(part, config, labels):
            if member.label in wanted and member.rejection is None:
                yield member


def _write_class(folder: Path, files: list[Member]) -> None:
    folder.mkdir(parents=True)
    for number, member in enumerate(files):
        # Numbered: two archives of a class may hold the same name.
        (folder / f"{number:05d}-{Path(member.key).name}").write_bytes(member.data)


def load_split(folder: Path, image_size: int) -> tuple[Tensor, Tensor]:
    """All images of a split, as training reads them for evaluation, and their class indices.

    Returns:
        images, uint8 (n, 3, image_size, image_size), and labels (n,).
    """
    transform = EvalTransform(image_size, resize=1.0)
    pixels: list[Image] = []
    labels: list[int] = []
    for label, class_folder in enumerate(sorted(folder.iterdir())):
        for path in sorted(class_folder.iterdir()):
            image = np.empty((image_size, image_size, 3), dtype=np.uint8)
            transform(memoryview(path.read_bytes()), image)
            pixels.append(image)
            labels.append(label)
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(labels)
