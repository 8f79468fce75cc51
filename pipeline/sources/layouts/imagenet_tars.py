"""ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the validation labels.

ImageNet-1K as published: two archives and a file with the labels.

    ILSVRC2012_img_train.tar                    n01440764.tar, n01443537.tar, ...: a tar per class
    ILSVRC2012_img_val.tar                      ILSVRC2012_val_00000001.JPEG, ...: all classes mixed
    imagenet_2012_validation_synset_labels.txt  line i: WordNet ID of validation image i
    LOC_val_solution.csv                        instead of the text file, as on Kaggle

Only headers are read here. A class tar inside the outer tar is a byte range of it, and is later
read as a tar of its own.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import replace

from pipeline.errors import DataError
from pipeline.sources.class_order import ordered_classes, visible_entries
from pipeline.sources.layout import Layout
from pipeline.sources.names import CLASS_TAR_SUFFIX, class_of_tar
from pipeline.sources.remote import HEADER_BLOCK, Entry, Storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import UNIT_BYTES, Part, Survey, fingerprint_items, pack_units
from pipeline.sources.validation_labels import KAGGLE_LABELS, SYNSET_LABELS, labels_file, labels_of

OUTER_TRAIN = "ILSVRC2012_img_train.tar"
OUTER_VALIDATION = "ILSVRC2012_img_val.tar"


def survey_imagenet(storage: Storage, root: str, config: SourceConfig) -> Survey:
    """Survey both archives.

    Raises DataError if one of them, or the validation labels, is missing or wrong, or if the job
    has splits of its own.
    """
    if config.splits is not None:
        raise DataError(
            "`splits` cannot divide ImageNet's own archives",
            place=config.root,
            remedy="remove it: the two archives are train and validation",
        )
    entries = visible_entries(storage, root)
    train_size = _archive_size(entries, OUTER_TRAIN, config)
    validation_size = _archive_size(entries, OUTER_VALIDATION, config)

    train = list(_class_tars(storage, f"{root}/{OUTER_TRAIN}", train_size))
    classes = ordered_classes(storage, root, config, sorted({part.group for part in train}))
    label_of = {class_id: label for label, (class_id, _) in enumerate(classes)}
    labelled = (replace(part, label=label_of[part.group]) for part in train)
    units = pack_units(labelled, "train", 0)

    # Missing labels are found before the long scan of the archive.
    labels_path = labels_file(storage, root)
    if labels_path is None:
        raise DataError(
            "the labels of the validation images are missing",
            place=config.root,
            remedy=f"put {SYNSET_LABELS} (one WordNet ID per line, in the order of the images' "
            f"names) or {KAGGLE_LABELS} beside the archives",
        )
    members = _members(storage, f"{root}/{OUTER_VALIDATION}", validation_size)
    stems = [posixpath.basename(name).partition(".")[0] for _, name in members]
    labels = labels_of(storage, labels_path, stems, label_of)
    parts = _cut_at_members(
        f"{root}/{OUTER_VALIDATION}",
        offsets=[offset for offset, _ in members],
        size=validation_size,
        labels=labels,
    )
    units += pack_units(parts, "validation", len(units))
    return Survey(
        layout="imagenet_tars",
        classes=classes,
        units=units,
        fingerprint_items=fingerprint_items(root, units),
        notes=[],
    )


def _archive_size(entries: Mapping[str, Entry], name: str, config: SourceConfig) -> int:
    if name not in entries:
        raise DataError(
            f"{name} is missing",
            place=config.root,
            remedy="put both archives of ILSVRC 2012 (tasks 1 and 2) into this folder",
        )
    return int(entries[name]["size"] or 0)


def _class_tars(storage: Storage, path: str, size: int) -> Iterator[Part]:
    """The class tars inside the outer tar, as byte ranges of it."""
    with (
        storage.open(path, 0, size, HEADER_BLOCK) as file,
        tarfile.open(fileobj=file, mode="r:") as outer,
    ):
        for member in outer:
            if not member.isfile() or not member.name.endswith(CLASS_TAR_SUFFIX):
                continue
            # A member of an uncompressed tar is one stretch of bytes, and this one is itself a tar.
            yield Part(
                kind="tar",
                path=path,
                first=member.offset_data,
                last=member.offset_data + member.size,
                group=class_of_tar(posixpath.basename(member.name)),
                size=member.size,
            )


def _members(storage: Storage, path: str, size: int) -> list[tuple[int, str]]:
    """(offset of the header, name) of each file in a tar."""
    with (
        storage.open(path, 0, size, HEADER_BLOCK) as file,
        tarfile.open(fileobj=file, mode="r:") as tar,
    ):
        return [(member.offset, member.name) for member in tar if member.isfile()]


def _cut_at_members(
    path: str, *, offsets: list[int], size: int, labels: list[int]
) -> Iterator[Part]:
    """Cut a tar into parts of about UNIT_BYTES, each beginning at a member's header.

    Example with ``UNIT_BYTES = 100``: members at 0, 60, 130 and 170 in a tar of 200 bytes give two
    parts, [0, 130) and [130, 200), with the labels of two members each.
    """
    begin = 0
    for number in range(1, len(offsets) + 1):
        end = offsets[number] if number < len(offsets) else size
        if end - offsets[begin] >= UNIT_BYTES or number == len(offsets):
            yield Part(
                kind="tar",
                path=path,
                first=offsets[begin],
                last=end,
                group="validation",
                labels=tuple(labels[begin:number]),
                size=end - offsets[begin],
                images=number - begin,
            )
            begin = number


LAYOUT = Layout(
    order=1,
    detect=lambda storage, root, config, entries: OUTER_TRAIN in entries,
    survey=survey_imagenet,
)
