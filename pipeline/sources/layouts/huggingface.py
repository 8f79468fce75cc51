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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import fsspec

from pipeline.errors import DataError
from pipeline.sources import class_sets, hub_labels, splits
from pipeline.sources.class_order import ordered_classes, visible_entries
from pipeline.sources.folder_files import folder_files
from pipeline.sources.layout import Entries, Layout
from pipeline.sources.member import Member, Rejection
from pipeline.sources.names import is_image
from pipeline.sources.remote import Storage, open_storage, without_secrets
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.split_names import TRAIN_NAMES, split_like
from pipeline.sources.units import UNIT_FILES, FingerprintItem, Part, SplitName, Survey, Unit

if TYPE_CHECKING:
    import pyarrow

_LFS_POINTER = b"version https://git-lfs"
_LOOKED_AT = 8  # folders and files
SAVED_FILES = ("dataset_dict.json", "state.json")  # save_to_disk writes one of them


class HubSplit(Protocol):
    """The members of ``datasets.Dataset`` that are used here."""

    column_names: list[str]
    features: Mapping[str, object]
    data: pyarrow.Table
    _fingerprint: str

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Mapping[str, object]: ...
    def cast_column(self, column: str, feature: object) -> HubSplit: ...


HubDataset = Mapping[str, HubSplit]


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
    if _is_saved(folder):
        return tuple(fingerprints)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple((str(path.relative_to(folder)), path.stat().st_size) for path in files)


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SAVED_FILES)


def read_part(part: Part, config: SourceConfig, labels: Mapping[str, int]) -> Iterator[Member]:
    """The rows of a part. ``labels``: label by class id."""
    import datasets

    # decode=False: preparation wants the file's own bytes, not the pixels.
    dataset = _load(config.root)[part.path].cast_column(
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
        raise _cannot_load(root, error) from None


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


@functools.lru_cache(maxsize=4)
def _load(root: str) -> HubDataset:
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = _load_remote(root) if "://" in root else _load_local(root)
    except Exception as error:  # its readers raise whatever they meet in a damaged file
        raise _cannot_load(root, error) from None
    is_dict = isinstance(loaded, dict)  # DatasetDict; a single Dataset has no splits
    return cast("HubDataset", loaded if is_dict else {"train": loaded})


def _cannot_load(root: str, error: Exception) -> DataError:
    folder = Path(root)
    files = sorted(folder.rglob("*.parquet")) if folder.is_dir() else []
    if any(file.read_bytes()[: len(_LFS_POINTER)] == _LFS_POINTER for file in files[:_LOOKED_AT]):
        return DataError(
            "its files are pointers of Git LFS", place=root, remedy=f"git -C {root} lfs pull"
        )
    text = without_secrets(str(error)) or type(error).__name__
    return DataError(
        f"`datasets` cannot load it: {text}",
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
    files = [name for name, _ in folder_files(storage, path).files]
    if any(f"{path}/{name}" in files for name in SAVED_FILES):
        return cast("object", datasets.load_from_disk(root))
    files_of: dict[str, list[str]] = {}
    for file in files:
        if file.endswith(".parquet"):
            prefix = re.split(r"[-_.]", posixpath.basename(file))[0].lower()
            split = prefix if split_like(prefix) is not None else "train"
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
