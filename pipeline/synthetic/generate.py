"""Generate a synthetic source in the layout of the real set, with a share of corrupt files.

Three steps, so that any number of processes can share the work: ``plan_files`` lists the tars or
folders, ``write_file`` writes one of them, ``finish_source`` assembles what needs all of them. Each
step may be repeated after a crash: files that exist are left alone, and a file that is written
again has the same bytes.

    class_tars       train/<class>.tar, val/<class>.tar
    class_folders    train/<class>/, val/<class>/
    imagenet_tars    .parts/train/<class>.tar  -> ILSVRC2012_img_train.tar (a tar of tars)
                     .parts/val/<number>.tar   -> ILSVRC2012_img_val.tar (one flat tar)
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.config.schema import DatasetConfig, SyntheticConfig
from pipeline.data.hashing import key_of
from pipeline.errors import ConfigError
from pipeline.files import atomic, write_text
from pipeline.sources.class_lists import class_list
from pipeline.sources.class_order import SYNSETS_FILE
from pipeline.sources.layouts.imagenet_tars import OUTER_TRAIN, OUTER_VALIDATION
from pipeline.sources.validation_labels import SYNSET_LABELS
from pipeline.synthetic.archives import join_tars, nest_tars, write_folder, write_tar
from pipeline.synthetic.contents import CORRUPT_KINDS, SyntheticFile, members

AUTO_CLASSES = "fall11_21841"  # classes are drawn from this list if the job names none
NAME_FORMAT = "{wnid}_{number}.JPEG"
VALIDATION_NAME_FORMAT = "ILSVRC2012_val_{number:08d}.JPEG"
IMAGES_PER_VALIDATION_PART = 500  # of the flat validation tar
PARTS_FOLDER = ".parts"


def plan_files(config: DatasetConfig, target: Path) -> list[SyntheticFile]:
    """The tars or folders of a dataset below ``target``, in a fixed order. Writes nothing.

    Raises:
        ConfigError: the job wants more classes than the class list has.
    """
    synthetic = _settings(config)
    wnids = _classes(config)
    corrupt = _corrupt_kinds(synthetic)
    is_nested = config.layout == "imagenet_tars"
    # Number of a validation image of each class: per class from 0, but over all classes from 1 in
    # the flat tar.
    flat_numbers = {wnid: number for number, wnid in enumerate(_flat_order(config), 1)}
    train = [
        _class_file(
            config,
            target,
            split="train",
            wnid=wnid,
            count=synthetic.images_per_class,
            corrupt=kinds,
            validation_number=flat_numbers[wnid] if is_nested else 0,
        )
        for wnid, kinds in zip(wnids, corrupt, strict=True)
    ]
    if is_nested:
        return train + _flat_validation_files(config, target)
    count = synthetic.validation_per_class
    return train + [
        _class_file(config, target, split="val", wnid=wnid, count=count) for wnid in wnids
    ]


def write_file(file: SyntheticFile) -> None:
    """Write a tar or folder unless it exists: complete or not at all, always the same bytes."""
    if file.path.exists() or (file.outer is not None and file.outer.exists()):
        return
    if file.path.suffix == ".tar":
        with atomic(file.path) as tar:
            write_tar(tar, members(file))
    else:
        write_folder(file.path, members(file))


def finish_source(config: DatasetConfig, target: Path) -> None:
    """Write synsets.txt (if the job names no class list) and ImageNet's archives.

    Call it after every file of ``plan_files`` is written.
    """
    if config.classes == "auto":
        write_text(target / SYNSETS_FILE, "".join(f"{wnid}\n" for wnid in _classes(config)))
    if config.layout == "imagenet_tars":
        _assemble_imagenet(config, target)
    for leftover in (*target.glob(".*.tmp"), *target.glob("*/.*.tmp")):  # of killed processes
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def corrupt_counts(config: DatasetConfig) -> dict[str, int]:
    """Number of corrupt files of each kind in the training split."""
    return dict(Counter(kind for kinds in _corrupt_kinds(_settings(config)) for kind in kinds))


def _settings(config: DatasetConfig) -> SyntheticConfig:
    if config.synthetic is None:
        raise ConfigError("the dataset is not synthetic", place="data", remedy="set `synthetic`")
    return config.synthetic


def _classes(config: DatasetConfig) -> list[str]:
    """The classes that have images: drawn by the seed, in the order of the class list."""
    synthetic = _settings(config)
    list_name = AUTO_CLASSES if config.classes == "auto" else config.classes
    wnids = class_list(list_name)
    if synthetic.classes > len(wnids):
        raise ConfigError(
            f"{synthetic.classes} classes are to be generated, but the list {list_name} "
            f"has {len(wnids)}",
            place="synthetic.classes",
            remedy=f"set it to at most {len(wnids)}",
        )
    random = _random("classes", synthetic.seed)
    # Drawn at random, so that two seeds have different classes.
    drawn = random.choice(len(wnids), synthetic.classes, replace=False)
    return [wnids[index] for index in sorted(drawn.tolist())]


def _random(purpose: str, seed: int) -> np.random.Generator:
    """A generator per purpose: draws for one purpose do not shift those for another."""
    return np.random.default_rng(key_of(purpose, seed))


def _corrupt_kinds(synthetic: SyntheticConfig) -> list[list[str]]:
    """Kinds of corrupt files per class, spread evenly over classes and kinds.

    Example: 24 classes of 60 images with ``corrupt_fraction`` 0.01 get round(14.4) = 14 files: the
    12 kinds in turn, then the first two again; each in a class of its own.
    """
    count = 0
    if synthetic.corrupt_fraction:
        images = synthetic.classes * synthetic.images_per_class
        count = max(1, round(synthetic.corrupt_fraction * images))
    # A permutation modulo the number of classes deals the files out like cards. "dirt" is part of
    # the seed.
    classes = _random("dirt", synthetic.seed).permutation(count) % synthetic.classes
    kinds: list[list[str]] = [[] for _ in range(synthetic.classes)]
    for number, index in enumerate(classes.tolist()):
        kinds[index].append(CORRUPT_KINDS[number % len(CORRUPT_KINDS)])
    return kinds


def _class_file(
    config: DatasetConfig,
    target: Path,
    *,
    split: str,
    wnid: str,
    count: int,
    corrupt: Sequence[str] = (),
    validation_number: int = 0,
) -> SyntheticFile:
    """The tar or folder of one class in one split."""
    synthetic = _settings(config)
    # The class tars of ImageNet are parts until they are nested in the outer tar.
    is_nested = config.layout == "imagenet_tars"
    folder = target / PARTS_FOLDER / split if is_nested else target / split
    return SyntheticFile(
        path=folder / (wnid if config.layout == "class_folders" else f"{wnid}.tar"),
        outer=target / OUTER_TRAIN if is_nested else None,
        seed=synthetic.seed,
        sizes=(synthetic.min_size, synthetic.max_size),
        split=split,
        name_format=NAME_FORMAT,
        wnids=(wnid,) * count,
        first=0,
        corrupt=tuple(corrupt),
        small_side=max(1, min(config.min_side, synthetic.min_size) // 2),
        validation_number=validation_number,
    )


def _flat_order(config: DatasetConfig) -> list[str]:
    """The order in which the classes take turns in the flat validation tar."""
    wnids = _classes(config)
    order = _random("validation", _settings(config).seed).permutation(len(wnids))
    return [wnids[index] for index in order.tolist()]


def _flat_labels(config: DatasetConfig) -> list[str]:
    """The class of each image of the flat validation tar, in the order of their names."""
    return _flat_order(config) * _settings(config).validation_per_class


def _flat_validation_files(config: DatasetConfig, target: Path) -> list[SyntheticFile]:
    synthetic = _settings(config)
    labels = _flat_labels(config)
    return [
        SyntheticFile(
            path=target / PARTS_FOLDER / "val" / f"{start:08d}.tar",
            outer=target / OUTER_VALIDATION,
            seed=synthetic.seed,
            sizes=(synthetic.min_size, synthetic.max_size),
            split="val",
            name_format=VALIDATION_NAME_FORMAT,
            wnids=tuple(labels[start : start + IMAGES_PER_VALIDATION_PART]),
            first=start + 1,
        )
        for start in range(0, len(labels), IMAGES_PER_VALIDATION_PART)
    ]


def _assemble_imagenet(config: DatasetConfig, target: Path) -> None:
    """Write the two archives and the validation labels, then delete the parts."""
    files = plan_files(config, target)
    for outer, write in ((OUTER_TRAIN, nest_tars), (OUTER_VALIDATION, join_tars)):
        path = target / outer
        if not path.exists():
            with atomic(path) as archive:
                write(archive, [file.path for file in files if file.outer == path])
    write_text(target / SYNSET_LABELS, "".join(f"{wnid}\n" for wnid in _flat_labels(config)))
    shutil.rmtree(target / PARTS_FOLDER, ignore_errors=True)
