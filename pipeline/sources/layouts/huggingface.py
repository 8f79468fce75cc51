"""Anything that `datasets.load_dataset` reads.

Hugging Face datasets on disk, in a store or on the hub. ``hub_loading`` loads them, ``hub_labels``
judges their labels.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import fsspec

from pipeline.errors import DataError
from pipeline.sources import class_sets, hub_labels, splits
from pipeline.sources.class_order import ordered_classes, visible_entries
from pipeline.sources.hub_loading import (
    SAVED_FILES,
    HubDataset,
    HubSplit,
    cannot_load,
    is_saved,
    load,
)
from pipeline.sources.layout import Entries, Layout
from pipeline.sources.member import Member, Rejection
from pipeline.sources.names import is_image
from pipeline.sources.remote import Storage, open_storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.split_names import TRAIN_NAMES, split_like
from pipeline.sources.units import UNIT_FILES, FingerprintItem, Part, SplitName, Survey, Unit

_LOOKED_AT = 8  # folders and files


@dataclass(frozen=True, kw_only=True)
class HubSummary:
    """A dataset as it was found."""

    splits: dict[SplitName, tuple[str, int]]  # our name -> (the dataset's own name, rows)
    class_ids: list[str]  # in the order of its labels
    counts: dict[SplitName, Counter[str]]  # rows by class
    fingerprints: list[str]  # one per split, made by `datasets`
    notes: list[str]


def inspect_dataset(config: SourceConfig) -> HubSummary:
    """Load a dataset and look at its splits and classes.

    Raises:
        DataError: it cannot be loaded, or lacks the image column or the label column.
    """
    import pyarrow.types

    dataset = load(config.root)
    splits.require_known(config, list(dataset))
    division = _divide(config, list(dataset))
    chosen = dict(division.splits)
    unlabelled = _unlabelled_test(dataset, division.splits, config)
    for split in unlabelled:
        del chosen[split]
    if "train" in chosen and "validation" not in chosen:
        chosen = {"" if split == "train" else split: name for split, name in chosen.items()}
    division = replace(division, stand_in="") if "validation" in unlabelled else division
    notes = [
        *division.notes,
        *(
            f"the split {division.splits[split]} is not used: its images have no labels"
            for split in unlabelled
        ),
    ]
    for name in chosen.values():
        _require_columns(name, dataset[name], config)
    used = {split: dataset[name] for split, name in chosen.items()}
    first = next(iter(used.values()))
    names = hub_labels.class_names(first.features[config.label_column])
    counts = {
        split: hub_labels.count_classes(
            names,
            _labels(rows, config.label_column),
            f"{config.root}, column {config.label_column}",
        )
        for split, rows in used.items()
    }
    hub_labels.require_labels(counts, config.root)
    class_sets.require_same(counts, config)
    are_text = pyarrow.types.is_string(first.data.schema.field(config.label_column).type)
    ids = hub_labels.ordered(names, counts, are_text=are_text)
    with_empty = {
        split: Counter({**dict.fromkeys(ids, 0), **rows}) for split, rows in counts.items()
    }
    return HubSummary(
        splits={split: (name, len(dataset[name])) for split, name in chosen.items()},
        class_ids=ids,
        counts=counts,
        fingerprints=[str(rows._fingerprint) for rows in used.values()],
        notes=[*notes, *class_sets.notes(with_empty)],
    )


def _labels(rows: HubSplit, column: str) -> list[tuple[object, int]]:
    """Each label that occurs, and its number of rows.

    Reads no image. A label that cannot be counted, such as a list, is given once.
    """
    import pyarrow
    import pyarrow.compute

    values = rows.data.column(column)
    try:
        counted = pyarrow.compute.value_counts(values).to_pylist()
    except pyarrow.ArrowNotImplementedError:
        return [(values[0].as_py(), 1)]
    return [(entry["values"], entry["counts"]) for entry in counted]


def _divide(config: SourceConfig, present: Sequence[str]) -> splits.Division:
    """What the dataset is divided into, with its own names of the splits."""
    if config.splits is not None:
        return splits.divide(config.splits, present)
    # A dataset without a split for training trains on its first one, if it is not divided.
    likes = {name: split_like(name) for name in present}
    has_train = any(like is not None and like.split == "train" for like in likes.values())
    own_names = {name: name for name in present}
    if not has_train:
        own_names = {TRAIN_NAMES[0]: present[0], **{name: name for name in present[1:]}}
    division = splits.divide(None, list(own_names))
    named = {split: own_names[name] for split, name in division.splits.items()}
    unused = sorted(set(present) - set(named.values()))
    return replace(division, splits=named, unused=unused)


def _unlabelled_test(
    dataset: HubDataset, chosen: Mapping[SplitName, str], config: SourceConfig
) -> list[SplitName]:
    """The splits that hold the hidden test images of a competition; none that the job names."""
    if config.splits is not None:
        return []
    return [
        split
        for split, name in chosen.items()
        if (like := split_like(name)) is not None
        and like.split == "test"
        and split in ("validation", "test")
        and _is_unlabelled(dataset[name], config.label_column)
    ]


def _is_unlabelled(split: HubSplit, column: str) -> bool:
    """True if every label is missing; -1 stands for a hidden label in published datasets."""
    if column not in split.column_names:
        return True
    return all(value in (-1, None) for value, _ in _labels(split, column))


def survey_dataset(_storage: Storage, _root: str, config: SourceConfig) -> Survey:
    """Survey a dataset: its rows, cut into units."""
    dataset = inspect_dataset(config)
    # A dataset has no synsets.txt; an empty file system stands for that.
    no_files = Storage(fsspec.filesystem("memory"))
    classes = ordered_classes(no_files, "/none", config, dataset.class_ids)
    units: list[Unit] = []
    for split, (name, rows) in dataset.splits.items():
        for first in range(0, rows, UNIT_FILES):
            part = Part(
                kind="huggingface",
                path=name,
                first=first,
                last=min(first + UNIT_FILES, rows),
                group=split or "train",
                images=min(UNIT_FILES, rows - first),
            )
            units.append(Unit(len(units), split, (part,)))
    return Survey(
        layout="huggingface",
        classes=classes,
        units=units,
        fingerprint_items=[_identity(config.root, dataset.fingerprints)],
        notes=dataset.notes,
    )


def _identity(root: str, fingerprints: Sequence[str]) -> FingerprintItem:
    """What stands for a dataset in the fingerprint of the prepared one: the same for a copy.

    `save_to_disk` stores the fingerprints that `datasets` has made. For a folder of Parquet files
    or images, it makes them from the paths; names and sizes of the files stand in for them.
    """
    folder = Path(root)
    if not folder.is_dir():
        return (root, *fingerprints)  # a URL, or a name on the hub
    if is_saved(folder):
        return tuple(fingerprints)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple((str(path.relative_to(folder)), path.stat().st_size) for path in files)


def read_part(part: Part, config: SourceConfig, labels: Mapping[str, int]) -> Iterator[Member]:
    """The rows of a part. ``labels``: label by class id."""
    import datasets

    # decode=False: preparation wants the file's own bytes, not the pixels.
    dataset = load(config.root)[part.path].cast_column(
        config.image_column, datasets.Image(decode=False)
    )
    names = hub_labels.class_names(dataset.features[config.label_column])
    for number in range(part.first, part.last):
        row = dataset[number]
        image = cast("Mapping[str, bytes | str | None]", row[config.image_column] or {})
        class_id = hub_labels.class_id(names, row[config.label_column])
        yield _member(
            image.get("bytes"),
            str(image.get("path") or ""),
            config,
            key=f"{part.group}/{number:09d}",
            label=labels[class_id],
        )


def _member(
    data: bytes | str | None, path: str, config: SourceConfig, *, key: str, label: int
) -> Member:
    """One image: its bytes, or those of the file at its path."""
    if data is None and path:
        # A path of a dataset in a folder may be relative to that folder.
        beside = Path(config.root) / path
        storage, place = open_storage(str(beside) if beside.exists() else path)
        if storage.info(place) is None:
            rejection = Rejection("missing_file", f"there is no file {path}")
            return Member(key=key, label=label, rejection=rejection)
        data = storage.read(place)
    return Member(key=key, label=label, data=cast("bytes | None", data) or b"")


def split_names(root: str) -> list[str]:
    """The splits of a dataset in a local folder, without reading its images.

    Raises:
        DataError: `datasets` cannot read the folder.
    """
    import datasets

    folder = Path(root)
    try:
        saved = folder / SAVED_FILES[0]
        if saved.is_file():
            return [str(name) for name in json.loads(saved.read_text())["splits"]]
        if (folder / SAVED_FILES[1]).is_file():
            return ["train"]
        return [str(name) for name in datasets.load_dataset_builder(root).config.data_files]
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise cannot_load(root, error) from None


def _is_dataset(storage: Storage, root: str, _config: SourceConfig, entries: Entries) -> bool:
    if {*SAVED_FILES, "dataset_info.json"} & set(entries):
        return True
    # A repository of the hub has its Parquet files in data/, or in a folder per configuration. A
    # table beside folders of images, such as a list of labels, makes no dataset.
    folders = [name for name, entry in entries.items() if entry["type"] == "directory"]
    inside = {
        name: list(visible_entries(storage, f"{root}/{name}")) for name in folders[:_LOOKED_AT]
    }
    if any(map(_is_table, entries)):
        return not any(is_image(name) for names in inside.values() for name in names)
    return any(map(_is_table, inside.get("data", [])))


def _is_table(name: str) -> bool:
    return name.endswith(".parquet")


def _require_columns(name: str, split: HubSplit, config: SourceConfig) -> None:
    for column in (config.image_column, config.label_column):
        if column not in split.column_names:
            raise DataError(
                f"split '{name}' has no column '{column}'",
                place=config.root,
                remedy="set image_column and label_column to two of: "
                f"{', '.join(split.column_names)}",
            )
    if _is_unlabelled(split, config.label_column):
        raise DataError(
            f"the images of split '{name}' have no labels",
            place=config.root,
            remedy="choose another split: splits: {train: NAME, validation: NAME, test: NAME}",
        )


LAYOUT = Layout(
    order=2,
    detect=_is_dataset,
    survey=survey_dataset,
    read=read_part,
    split_names=split_names,
    is_folder=False,
)
