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

import csv
import io
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

OUTER_TRAIN = "ILSVRC2012_img_train.tar"
OUTER_VALIDATION = "ILSVRC2012_img_val.tar"
SYNSET_LABELS = "imagenet_2012_validation_synset_labels.txt"
KAGGLE_LABELS = "LOC_val_solution.csv"

Labels = dict[str, int]  # class index by the stem of an image's name


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
    file_labels = _read_labels(storage, root, config, label_of)
    members = _members(storage, f"{root}/{OUTER_VALIDATION}", validation_size)
    stems = [posixpath.basename(name).partition(".")[0] for _, name in members]
    labels = _match_labels(file_labels, stems, config)
    parts = _cut_at_members(
        f"{root}/{OUTER_VALIDATION}",
        offsets=[offset for offset, _ in members],
        size=validation_size,
        labels=[labels[stem] for stem in stems],
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


def _read_labels(
    storage: Storage, root: str, config: SourceConfig, label_of: dict[str, int]
) -> Labels | list[int]:
    """Labels by the stem of the image's name, or as a list in the order of the names."""
    if storage.info(f"{root}/{SYNSET_LABELS}"):
        place = f"{config.root}/{SYNSET_LABELS}"
        ids = storage.read(f"{root}/{SYNSET_LABELS}").decode().split()
        return [_label(class_id, label_of, place) for class_id in ids]
    if storage.info(f"{root}/{KAGGLE_LABELS}"):
        place = f"{config.root}/{KAGGLE_LABELS}"
        rows = csv.DictReader(io.StringIO(storage.read(f"{root}/{KAGGLE_LABELS}").decode()))
        return {
            # PredictionString is "n01440764 12 5 210 180": the class, then boxes.
            row["ImageId"]: _label(row["PredictionString"].split()[0], label_of, place)
            for row in rows
        }
    raise DataError(
        "the labels of the validation images are missing",
        place=config.root,
        remedy=f"put {SYNSET_LABELS} (one WordNet ID per line, in the order of the images' names) "
        f"or {KAGGLE_LABELS} beside the archives",
    )


def _match_labels(labels: Labels | list[int], stems: list[str], config: SourceConfig) -> Labels:
    """The label of each validation image by its stem. Raises DataError if an image has none."""
    if isinstance(labels, list):
        # Line i belongs to the image with the i-th name, wherever that image lies in the tar. With
        # a line too few or too many, it is unknown which image a line belongs to, so no line is
        # used.
        same_length = len(labels) == len(stems)
        labels = dict(zip(sorted(stems), labels, strict=True)) if same_length else {}
    missing = [stem for stem in stems if stem not in labels]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(stems)} validation images have no label ({missing[0]})",
            place=config.root,
            remedy=f"{SYNSET_LABELS} needs one line for each image of {OUTER_VALIDATION}",
        )
    return labels


def _label(class_id: str, label_of: dict[str, int], place: str) -> int:
    if class_id not in label_of:
        raise DataError(
            f"{class_id} is not one of the dataset's classes",
            place=place,
            remedy="correct the file, or `classes`",
        )
    return label_of[class_id]


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
            )
            begin = number


LAYOUT = Layout(
    order=1,
    detect=lambda storage, root, config, entries: OUTER_TRAIN in entries,
    survey=survey_imagenet,
)
