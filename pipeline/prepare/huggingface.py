"""Hugging Face datasets as a source: anything that ``datasets.load_dataset`` or ``load_from_disk`` reads."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.look import TRAIN, VALIDATION
from pipeline.config.schema import DatasetConfig
from pipeline.errors import DataError
from pipeline.prepare.units import SplitName


@dataclass(frozen=True)
class Found:
    """``splits``: ours -> (its name there, rows); ``names``: the classes in the order of its labels."""

    splits: dict[SplitName, tuple[str, int]]
    names: list[str]
    fingerprints: list[str]


def look(config: DatasetConfig) -> Found:
    """Raises DataError where it cannot be loaded or lacks a column."""
    dataset = _load(config.root)
    names = {name.lower(): name for name in dataset}
    train = next((names[name] for name in TRAIN if name in names), None) or next(iter(dataset))
    validation = next((names[name] for name in VALIDATION if name in names and names[name] != train), None)
    splits: dict[SplitName, tuple[str, int]] = {"train" if validation else "": (train, len(dataset[train]))}
    if validation:
        splits["validation"] = (validation, len(dataset[validation]))
    used = [name for name, _ in splits.values()]
    for name in used:
        for column in (config.image_column, config.label_column):
            if column not in dataset[name].column_names:
                remedy = f"image_column and label_column: two of {', '.join(dataset[name].column_names)}"
                raise DataError(f"split '{name}' has no column '{column}'", place=config.root, remedy=remedy)
    return Found(splits, _names(dataset, used, config.label_column), [str(dataset[name]._fingerprint) for name in used])


def rows(config: DatasetConfig, split: str, first: int, last: int) -> Iterator[tuple[str, str, bytes]]:
    """(name, class, encoded image) of rows [first, last)."""
    import datasets

    dataset = _load(config.root)[split].cast_column(config.image_column, datasets.Image(decode=False))
    label = dataset.features[config.label_column]
    for number in range(first, last):
        row = dataset[number]
        image = row[config.image_column] or {}
        data = image.get("bytes")
        if data is None and image.get("path"):
            data = Path(image["path"]).read_bytes()
        yield f"{number:09d}", _class_name(label, row[config.label_column]), data or b""


def _names(dataset: Any, splits: list[str], column: str) -> list[str]:
    names = getattr(dataset[splits[0]].features[column], "names", None)
    if names:
        return list(names)
    values = {value for split in splits for value in dataset[split].unique(column)}
    return [str(value) for value in sorted(values)]


def _class_name(label: Any, value: Any) -> str:
    names = getattr(label, "names", None)
    return str(names[value]) if names and isinstance(value, int) and 0 <= value < len(names) else str(value)


@functools.lru_cache(maxsize=4)
def _load(root: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        saved = Path(root)
        if (saved / "dataset_dict.json").is_file() or (saved / "state.json").is_file():
            loaded = datasets.load_from_disk(root)
        else:
            loaded = datasets.load_dataset(root)
    except (OSError, ValueError, RuntimeError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        remedy = "a folder of Parquet files or images, what save_to_disk wrote, or a dataset's name on the hub"
        raise DataError(f"`datasets` cannot load it: {error}", place=root, remedy=remedy) from error
    return loaded if isinstance(loaded, dict) else datasets.DatasetDict({"train": loaded})
