"""Hugging Face datasets as a source: anything that ``datasets.load_dataset`` or ``load_from_disk`` reads."""

from __future__ import annotations

import functools
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.sources.inspection import TRAIN, VALIDATION
from pipeline.sources.remote import open_storage, without_secrets
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import SplitName

SAVED = ("dataset_dict.json", "state.json")  # one of them is beside what save_to_disk wrote


@dataclass(frozen=True)
class Found:
    """``splits``: ours -> (its name there, rows); ``names``: the classes in the order of its labels."""

    splits: dict[SplitName, tuple[str, int]]
    names: list[str]
    fingerprints: list[str]


def look(config: SourceConfig) -> Found:
    """Raises DataError where it cannot be loaded or lacks a column."""
    dataset = _load(config.root)
    names = {name.lower(): name for name in dataset}
    train = next((names[name] for name in TRAIN if name in names), None) or next(iter(dataset))
    validation = next(
        (names[name] for name in VALIDATION if name in names and names[name] != train), None
    )
    splits: dict[SplitName, tuple[str, int]] = {
        "train" if validation else "": (train, len(dataset[train]))
    }
    if validation:
        splits["validation"] = (validation, len(dataset[validation]))
    used = [name for name, _ in splits.values()]
    for name in used:
        for column in (config.image_column, config.label_column):
            if column not in dataset[name].column_names:
                remedy = (
                    f"image_column and label_column: two of {', '.join(dataset[name].column_names)}"
                )
                raise DataError(
                    f"split '{name}' has no column '{column}'", place=config.root, remedy=remedy
                )
    return Found(
        splits,
        _names(dataset, used, config.label_column),
        [str(dataset[name]._fingerprint) for name in used],
    )


def rows(
    config: SourceConfig, split: str, first: int, last: int
) -> Iterator[tuple[str, str, bytes]]:
    """(name, class, encoded image) of rows [first, last)."""
    import datasets

    dataset = _load(config.root)[split].cast_column(
        config.image_column, datasets.Image(decode=False)
    )
    label = dataset.features[config.label_column]
    for number in range(first, last):
        row = dataset[number]
        image = row[config.image_column] or {}
        data = image.get("bytes")
        if data is None and image.get("path"):
            storage, path = open_storage(image["path"])
            data = storage.read(path)
        yield f"{number:09d}", _class_name(label, row[config.label_column]), data or b""


def _names(dataset: Any, splits: list[str], column: str) -> list[str]:
    names = getattr(dataset[splits[0]].features[column], "names", None)
    if names:
        return list(names)
    values = {value for split in splits for value in dataset[split].unique(column)}
    return [str(value) for value in sorted(values)]


def _class_name(label: Any, value: Any) -> str:
    names = getattr(label, "names", None)
    return (
        str(names[value])
        if names and isinstance(value, int) and 0 <= value < len(names)
        else str(value)
    )


@functools.lru_cache(maxsize=4)
def _load(root: str) -> Any:
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
        cause = f"`datasets` cannot load it: {without_secrets(str(error))}"
        remedy = "a folder of Parquet files or images, what save_to_disk wrote, or a dataset's name on the hub"
        raise DataError(cause, place=without_secrets(root), remedy=remedy) from None
    return loaded if isinstance(loaded, dict) else datasets.DatasetDict({"train": loaded})


def _load_local(root: str) -> Any:
    import datasets

    if any((Path(root) / name).is_file() for name in SAVED):
        return datasets.load_from_disk(root)
    return datasets.load_dataset(root)


def _load_remote(root: str) -> Any:
    """What save_to_disk wrote, or Parquet files whose names begin with their split's."""
    import datasets

    storage, path = open_storage(root)
    files = sorted(name for name, _ in storage.files(path))
    if any(f"{path}/{name}" in files for name in SAVED):
        return datasets.load_from_disk(root)
    splits: dict[str, list[str]] = {}
    for file in files:
        if file.endswith(".parquet"):
            first = re.split(r"[-_.]", posixpath.basename(file))[0].lower()
            splits.setdefault(first if first in TRAIN + VALIDATION else "train", []).append(
                storage.fs.unstrip_protocol(file)
            )
    return datasets.load_dataset("parquet", data_files=splits)
