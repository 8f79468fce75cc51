"""Anything that `datasets.load_dataset` reads.

Hugging Face datasets on disk, in a store or on the hub.

``datasets`` is imported inside functions: it takes seconds to import, and most jobs never need it.
Its objects have no types that can be checked, so the few members used here are written down as
protocols.
"""

from __future__ import annotations

import functools
import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import fsspec

from pipeline.errors import DataError
from pipeline.sources import splits
from pipeline.sources.class_order import ordered_classes
from pipeline.sources.layout import Entries, Layout
from pipeline.sources.member import Member
from pipeline.sources.names import SPLIT_NAMES, TRAIN_NAMES, first_present
from pipeline.sources.remote import Storage, open_storage, without_secrets
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import UNIT_FILES, FingerprintItem, Part, SplitName, Survey, Unit

SAVED_FILES = ("dataset_dict.json", "state.json")  # save_to_disk writes one of them


class HubSplit(Protocol):
    """The members of ``datasets.Dataset`` that are used here."""

    column_names: list[str]
    features: Mapping[str, object]
    _fingerprint: str

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Mapping[str, object]: ...
    def unique(self, column: str) -> list[str | int]: ...
    def cast_column(self, column: str, feature: object) -> HubSplit: ...


HubDataset = Mapping[str, HubSplit]


@dataclass(frozen=True, kw_only=True)
class HubSummary:
    """A dataset as it was found."""

    splits: dict[SplitName, tuple[str, int]]  # our name -> (the dataset's own name, rows)
    class_ids: list[str]  # in the order of its labels
    fingerprints: list[str]  # one per split, made by `datasets`
    notes: list[str]


def inspect_dataset(config: SourceConfig) -> HubSummary:
    """Load a dataset and look at its splits and classes.

    Raises:
        DataError: it cannot be loaded, or lacks the image column or the label column.
    """
    dataset = _load(config.root)
    splits.require_known(config, list(dataset))
    division = _divide(config, list(dataset))
    notes = list(division.notes)
    chosen = dict(division.splits)
    test = chosen.get("test")
    if config.splits is None and test and _is_unlabelled(dataset[test], config.label_column):
        del chosen["test"]
        notes.append(f"the split {test} is not used: its images have no labels")
    for name in chosen.values():
        _require_labels(name, dataset[name], config)
    used = {name: dataset[name] for name in chosen.values()}
    return HubSummary(
        splits={split: (name, len(dataset[name])) for split, name in chosen.items()},
        class_ids=_class_ids(list(used.values()), config.label_column),
        fingerprints=[str(split._fingerprint) for split in used.values()],
        notes=notes,
    )


def _divide(config: SourceConfig, present: Sequence[str]) -> splits.Division:
    """What the dataset is divided into, with its own names of the splits."""
    if config.splits is not None:
        return splits.divide(config.splits, present)
    # Split names of datasets are free text: "Train" and "TRAIN" occur.
    own_names = {name.lower(): name for name in present}
    # A dataset without a split for training trains on its first one, if it is not divided.
    if first_present(TRAIN_NAMES, own_names) is None:
        own_names = {TRAIN_NAMES[0]: present[0]} | dict(list(own_names.items())[1:])
    division = splits.divide(None, list(own_names))
    named = {split: own_names[name] for split, name in division.splits.items()}
    return splits.Division(named, division.notes)


def _is_unlabelled(split: HubSplit, column: str) -> bool:
    """True if every label is missing; -1 stands for a hidden label in published datasets."""
    if column not in split.column_names:
        return True
    labels: set[object] = set(split.unique(column))
    return labels <= {-1, None}


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
    if _is_saved(folder):
        return tuple(fingerprints)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple((str(path.relative_to(folder)), path.stat().st_size) for path in files)


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SAVED_FILES)


def rows(
    config: SourceConfig, split: str, first: int, last: int
) -> Iterator[tuple[str, str, bytes]]:
    """(name, class id, encoded image) of rows [first, last); no image gives b""."""
    import datasets

    # decode=False: preparation wants the file's own bytes, not the pixels.
    dataset = _load(config.root)[split].cast_column(
        config.image_column, datasets.Image(decode=False)
    )
    label_names = _label_names(dataset.features[config.label_column])
    for number in range(first, last):
        row = dataset[number]
        image = cast("Mapping[str, bytes | str | None]", row[config.image_column] or {})
        data = image.get("bytes")
        path = image.get("path")
        if data is None and path:
            storage, path_in_storage = open_storage(str(path))
            data = storage.read(path_in_storage)
        class_id = _class_id(label_names, row[config.label_column])
        yield f"{number:09d}", class_id, cast("bytes | None", data) or b""


def read_part(part: Part, config: SourceConfig, labels: Mapping[str, int]) -> Iterator[Member]:
    """The rows of a part. ``labels``: label by class id."""
    for name, class_id, data in rows(config, part.path, part.first, part.last):
        yield Member(key=f"{part.group}/{name}", label=labels[class_id], data=data)


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
        raise _cannot_load(root, error) from None


def _is_dataset(_storage: Storage, _root: str, _config: SourceConfig, entries: Entries) -> bool:
    saved = {*SAVED_FILES, "dataset_info.json"} & set(entries)
    return bool(saved) or any(name.endswith(".parquet") for name in entries)


def _require_labels(name: str, split: HubSplit, config: SourceConfig) -> None:
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


def _class_ids(splits: Sequence[HubSplit], column: str) -> list[str]:
    """Names of a ClassLabel column; otherwise the sorted values that occur."""
    names = _label_names(splits[0].features[column])
    if names:
        return names
    values = {value for split in splits for value in split.unique(column)}
    return [str(value) for value in sorted(values)]


def _class_id(names: Sequence[str], value: object) -> str:
    if names and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return str(value)


def _label_names(feature: object) -> list[str]:
    """Names of a ``datasets.ClassLabel``; empty for any other feature."""
    return [str(name) for name in getattr(feature, "names", None) or []]


@functools.lru_cache(maxsize=4)
def _load(root: str) -> HubDataset:
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = _load_remote(root) if "://" in root else _load_local(root)
    except (
        OSError,
        ValueError,
        RuntimeError,
        ConnectionError,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise _cannot_load(root, error) from None
    is_dict = isinstance(loaded, dict)  # DatasetDict; a single Dataset has no splits
    return cast("HubDataset", loaded if is_dict else {"train": loaded})


def _cannot_load(root: str, error: Exception) -> DataError:
    return DataError(
        f"`datasets` cannot load it: {without_secrets(str(error))}",
        place=without_secrets(root),
        remedy="give a folder of Parquet files or images, a folder that save_to_disk wrote, "
        "or a dataset's name on the hub",
    )


def _load_local(root: str) -> object:
    import datasets

    if _is_saved(Path(root)):
        return cast("object", datasets.load_from_disk(root))
    return cast("object", datasets.load_dataset(root))


def _load_remote(root: str) -> object:
    """Load a folder that save_to_disk wrote, or Parquet files such as "train-00000.parquet"."""
    import datasets

    storage, path = open_storage(root)
    files = sorted(name for name, _ in storage.files(path))
    if any(f"{path}/{name}" in files for name in SAVED_FILES):
        return cast("object", datasets.load_from_disk(root))
    files_of: dict[str, list[str]] = {}
    for file in files:
        if file.endswith(".parquet"):
            prefix = re.split(r"[-_.]", posixpath.basename(file))[0].lower()
            split = prefix if prefix in SPLIT_NAMES else "train"
            files_of.setdefault(split, []).append(storage.fs.unstrip_protocol(file))
    return cast("object", datasets.load_dataset("parquet", data_files=files_of))


LAYOUT = Layout(
    order=2,
    detect=_is_dataset,
    survey=survey_dataset,
    read=read_part,
    split_names=split_names,
    is_folder=False,
)
