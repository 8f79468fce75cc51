"""Anything that `datasets.load_dataset` reads.

Hugging Face datasets on disk, in a store or on the hub.

``datasets`` is imported inside functions: it takes seconds to import, and most jobs never need it.
Its objects have no types that can be checked, so the few members used here are written down as
protocols.
"""

from __future__ import annotations

import functools
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import fsspec

from pipeline.errors import DataError
from pipeline.sources.class_order import ordered_classes
from pipeline.sources.layout import Entries, Layout
from pipeline.sources.member import Member
from pipeline.sources.names import SPLIT_NAMES, TRAIN_NAMES, VALIDATION_NAMES, first_present
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


def inspect_dataset(config: SourceConfig) -> HubSummary:
    """Load a dataset and look at its splits and classes.

    Raises:
        DataError: it cannot be loaded, or lacks the image column or the label column.
    """
    dataset = _load(config.root)
    # Split names of datasets are free text: "Train" and "TRAIN" occur.
    own_names = {name.lower(): name for name in dataset}
    train_key = first_present(TRAIN_NAMES, own_names)
    train = own_names[train_key] if train_key is not None else next(iter(dataset))
    # A dataset whose only split is "test" trains on it, so it is no validation split as well.
    others = [key for key, name in own_names.items() if name != train]
    validation_key = first_present(VALIDATION_NAMES, others)
    splits: dict[SplitName, tuple[str, int]] = {}
    if validation_key is None:
        splits[""] = (train, len(dataset[train]))
    else:
        validation = own_names[validation_key]
        splits["train"] = (train, len(dataset[train]))
        splits["validation"] = (validation, len(dataset[validation]))
    used = {name: dataset[name] for name, _ in splits.values()}
    for name, split in used.items():
        _require_columns(name, split, config)
    return HubSummary(
        splits=splits,
        class_ids=_class_ids(list(used.values()), config.label_column),
        fingerprints=[str(split._fingerprint) for split in used.values()],
    )


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
        notes=[],
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


def _is_dataset(_storage: Storage, _root: str, entries: Entries) -> bool:
    saved = {*SAVED_FILES, "dataset_info.json"} & set(entries)
    return bool(saved) or any(name.endswith(".parquet") for name in entries)


def _require_columns(name: str, split: HubSplit, config: SourceConfig) -> None:
    for column in (config.image_column, config.label_column):
        if column not in split.column_names:
            raise DataError(
                f"split '{name}' has no column '{column}'",
                place=config.root,
                remedy="set image_column and label_column to two of: "
                f"{', '.join(split.column_names)}",
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
        raise DataError(
            f"`datasets` cannot load it: {without_secrets(str(error))}",
            place=without_secrets(root),
            remedy="give a folder of Parquet files or images, a folder that save_to_disk wrote, "
            "or a dataset's name on the hub",
        ) from None
    is_dict = isinstance(loaded, dict)  # DatasetDict; a single Dataset has no splits
    return cast("HubDataset", loaded if is_dict else {"train": loaded})


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
    is_folder=False,
)
