"""ImageNet-1K as published: a tar of class tars, a flat tar of validation images, and their labels in a file beside them."""

from __future__ import annotations

import csv
import io
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import replace

from pipeline.errors import DataError
from pipeline.sources.class_order import names_in, ordered_classes
from pipeline.sources.remote import Storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import UNIT_BYTES, Part, Survey, bundle, listing

OUTER_TRAIN, OUTER_VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
SYNSET_LABELS, KAGGLE_LABELS = "imagenet_2012_validation_synset_labels.txt", "LOC_val_solution.csv"
HEADERS = 1 << 16  # bytes a request, where only the headers of a tar are read


def survey_imagenet(storage: Storage, root: str, config: SourceConfig) -> Survey:
    names = names_in(storage, root)
    for needed in (OUTER_TRAIN, OUTER_VALIDATION):
        if needed not in names:
            raise DataError(
                f"{needed} is missing",
                place=config.root,
                remedy="both archives of ILSVRC 2012 (tasks 1 and 2) belong here",
            )
    train = list(_inner_tars(storage, f"{root}/{OUTER_TRAIN}", int(names[OUTER_TRAIN]["size"])))
    classes = ordered_classes(storage, root, config, sorted({part.group for part in train}))
    index = {one: number for number, (one, _) in enumerate(classes)}
    units = bundle((replace(part, label=index[part.group]) for part in train), "train", 0)
    labels = _validation_labels(storage, root, config, index)
    parts = _validation_parts(
        storage, f"{root}/{OUTER_VALIDATION}", int(names[OUTER_VALIDATION]["size"]), labels, config
    )
    units += bundle(parts, "validation", len(units))
    return Survey("imagenet_tars", classes, units, listing(root, units), [])


def _inner_tars(storage: Storage, path: str, size: int) -> Iterator[Part]:
    with (
        storage.open(path, 0, size, HEADERS) as file,
        tarfile.open(fileobj=file, mode="r:") as outer,
    ):
        for member in outer:
            if not member.isfile() or not member.name.endswith(".tar"):
                continue
            wnid = posixpath.basename(member.name).removesuffix(".tar")
            yield Part(
                "tar",
                path,
                member.offset_data,
                member.offset_data + member.size,
                wnid,
                size=member.size,
            )


def _validation_labels(
    storage: Storage, root: str, config: SourceConfig, index: dict[str, int]
) -> dict[str, int] | list[int]:
    """Class index by name of the image (without its ending), or in the order of the images' names."""
    if storage.info(f"{root}/{SYNSET_LABELS}"):
        words = storage.read(f"{root}/{SYNSET_LABELS}").decode().split()
        labels: dict[str, int] | list[int] = [
            _index_of(word, index, f"{config.root}/{SYNSET_LABELS}") for word in words
        ]
    elif storage.info(f"{root}/{KAGGLE_LABELS}"):
        rows = csv.DictReader(io.StringIO(storage.read(f"{root}/{KAGGLE_LABELS}").decode()))
        place = f"{config.root}/{KAGGLE_LABELS}"
        labels = {
            row["ImageId"]: _index_of(row["PredictionString"].split()[0], index, place)
            for row in rows
        }
    else:
        raise DataError(
            "the labels of the validation images are missing",
            place=config.root,
            remedy=f"beside the archives: {SYNSET_LABELS} (a WordNet ID a line, in the images' order) or {KAGGLE_LABELS}",
        )
    return labels


def _index_of(wnid: str, index: dict[str, int], place: str) -> int:
    if wnid not in index:
        raise DataError(
            f"{wnid} is not one of the dataset's classes",
            place=place,
            remedy="correct the file, or `classes`",
        )
    return index[wnid]


def _validation_parts(
    storage: Storage, path: str, size: int, labels: dict[str, int] | list[int], config: SourceConfig
) -> Iterator[Part]:
    with storage.open(path, 0, size, HEADERS) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        members = [(member.offset, member.name) for member in tar if member.isfile()]
    stems = [posixpath.basename(name).partition(".")[0] for _, name in members]
    if isinstance(labels, list):
        labels = dict(zip(sorted(stems), labels, strict=False)) if len(labels) == len(stems) else {}
    missing = [stem for stem in stems if stem not in labels]
    if missing:
        cause = f"{len(missing)} of {len(stems)} validation images have no label ({missing[0]})"
        raise DataError(
            cause,
            place=config.root,
            remedy=f"{SYNSET_LABELS} needs one line for each image of {OUTER_VALIDATION}",
        )
    begin = 0
    for number in range(1, len(members) + 1):
        end = members[number][0] if number < len(members) else size
        if end - members[begin][0] >= UNIT_BYTES or number == len(members):
            found = tuple(labels[stem] for stem in stems[begin:number])
            yield Part(
                "tar",
                path,
                members[begin][0],
                end,
                "validation",
                labels=found,
                size=end - members[begin][0],
            )
            begin = number
