"""Summarises a source: number of images and classes, usual size.

The survey decides what is there; of a few images the header is read. The configuration calls this
before anything is prepared, to choose values that are written as 'auto'.
"""

from __future__ import annotations

import io
import statistics
import tarfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from PIL import Image

from pipeline.sources import contents
from pipeline.sources.image_kinds import HEAD_BYTES, can_read_heif, image_kind
from pipeline.sources.member import Member
from pipeline.sources.names import may_be_image
from pipeline.sources.reader import members
from pipeline.sources.remote import HEADER_BLOCK, Storage, open_storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.survey import survey
from pipeline.sources.units import Part, Survey

SAMPLED_IMAGES = 64  # images whose size is read
SAMPLED_TARS = 40  # tars whose members are counted; the count of the others is estimated by size
USUAL_SIDE = 224  # short side in pixels, if no size can be read

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class SourceSummary:
    """What a source holds."""

    layout: str
    classes: int
    images: int  # of the training split if there is one; approximate for many tars
    short_side: int  # median, in pixels
    has_validation: bool

    @property
    def summary(self) -> str:
        """One line for the user."""
        split = "with a validation split" if self.has_validation else "no validation split"
        layout = self.layout.replace("_", " ")
        return (
            f"{self.images} images of {self.classes} classes ({layout}, {split}), "
            f"median short side {self.short_side} pixels"
        )


def inspect_source(config: SourceConfig) -> SourceSummary:
    """Survey a source and summarise it.

    Raises:
        DataError: it cannot be surveyed, or none of its files is an image that can be read.
    """
    source = survey(config)
    storage, root = open_storage(config.root)
    splits = {unit.split for unit in source.units}
    # Without training images, the first split tells the sizes.
    trained = "train" if "train" in splits else "" if "" in splits else source.units[0].split
    parts = [part for unit in source.units if unit.split == trained for part in unit.parts]
    classes = {class_id: label for label, (class_id, _) in enumerate(source.classes)}
    sampled = _sampled_images(parts, config, classes)
    sides = [side for member in sampled if (side := short_side_of(member.data))]
    if sampled and not any(_is_readable(member.data) for member in sampled):
        raise contents.unreadable(storage, root, [member.key for member in sampled])
    return SourceSummary(
        layout=source.layout,
        classes=len(_classes_with_images(source)),
        images=_count(storage, parts),
        short_side=int(statistics.median(sides)) if sides else USUAL_SIDE,
        has_validation="validation" in splits,
    )


def _classes_with_images(source: Survey) -> set[int]:
    """Labels of the classes that have images, as far as the survey knows."""
    labels: set[int] = set()
    for unit in source.units:
        for part in unit.parts:
            if part.images is None or part.images:
                labels |= {part.label, *part.labels}
    known = labels - {-1}
    return known or set(range(len(source.classes)))


def _sampled_images(
    parts: Sequence[Part], config: SourceConfig, classes: dict[str, int]
) -> list[Member]:
    """About SAMPLED_IMAGES files that may be images, from parts all over the source."""
    filled = [part for part in parts if part.images is None or part.images]
    chosen = _evenly_spaced(filled, SAMPLED_IMAGES)
    # Of 1000 parts, 64 give one image each; of 3 parts, each gives 22.
    per_part = -(-SAMPLED_IMAGES // max(1, len(chosen)))
    sampled: list[Member] = []
    for part in chosen:
        usable = (
            member
            for member in members(part, config, classes)
            if member.data and may_be_image(member.key)
        )
        sampled += islice(usable, per_part)
    return sampled


def _count(storage: Storage, parts: Sequence[Part]) -> int:
    """Number of files that may be images."""
    known = sum(part.images for part in parts if part.images is not None)
    tars = [part for part in parts if part.images is None]
    if not tars:
        return known
    sampled = _evenly_spaced(tars, SAMPLED_TARS)
    counted = sum(_count_members(storage, part) for part in sampled)
    if len(sampled) < len(tars):
        # Not every tar was counted. Assume equally many images per byte in the others: 40 of 1000
        # tars with 50,000 images in 5 GB, and 130 GB in all, make 50,000 * 130 / 5 images.
        sampled_bytes = max(1, sum(part.size for part in sampled))
        counted = round(counted * sum(part.size for part in tars) / sampled_bytes)
    return known + counted


def _count_members(storage: Storage, part: Part) -> int:
    """Number of files in a tar that may be images. Damage ends the count."""
    count = 0
    try:
        with (
            storage.open(part.path, part.first, part.last, HEADER_BLOCK) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            for member in tar:
                # tarfile remembers every member, which would grow with the archive.
                tar.members = []  # type: ignore[attr-defined]
                count += member.isfile() and may_be_image(member.name)
    except (tarfile.TarError, EOFError):
        return count  # preparation reports the damage
    return count


def _is_readable(data: bytes) -> bool:
    kind = image_kind(data[:HEAD_BYTES])
    return bool(kind) and (kind != "HEIF" or can_read_heif())


def short_side_of(data: bytes) -> int:
    """Short side of an image in pixels, from its header; 0 if it cannot be read."""
    with warnings.catch_warnings():
        # Pillow warns of huge images. Only the header is read here, so they cost nothing.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                return min(image.size)
        except Exception:  # damaged bytes make Pillow raise whatever its decoders meet
            return 0


def _evenly_spaced(items: Sequence[Item], most: int) -> list[Item]:
    """At most ``most`` of the items, evenly spaced: 2 of [a, b, c, d] are [a, c]."""
    step = max(1.0, len(items) / most)
    return [items[int(index * step)] for index in range(min(len(items), most))]
