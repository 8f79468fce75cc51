"""``dataset.json``: the only module that writes and reads the description of a prepared dataset."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar, get_origin, get_type_hints

from pipeline.data.shards import FORMAT, ShardInfo
from pipeline.files import file_digest, matches_digest, with_digest, write_json
from pipeline.layout import CLASSES_JSON, DATASET_JSON

Record = TypeVar("Record")


class UnsupportedFormat(ValueError):
    """The dataset was written by a version with a different ``FORMAT``."""


@dataclass(frozen=True, kw_only=True)
class SplitDescription:
    """One split: number of images, images per class in index order, and its shards in order."""

    images: int
    images_by_class: list[int]
    shards: list[ShardInfo]


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    """The content of ``dataset.json``.

    ``fingerprint``: digest of everything that the shards' bytes depend on. ``layout``: layout of
    the source. ``classes``: number of classes. ``rejected``, ``duplicates``, ``changed``: number of
    images by reason. ``mean``, ``std``: per channel, of the training images (RGB in [0, 1]).
    ``source_content``: digest of every file of the source; '' in datasets of earlier versions.
    """

    format: int
    fingerprint: str
    seed: int
    layout: str
    splits: dict[str, SplitDescription]
    classes: int
    classes_digest: str = ""  # of classes.json; '' of an earlier version
    rejected: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    images_by_short_side: dict[str, int] = field(default_factory=dict)
    source_content: str = ""
    settings: dict[str, object] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | bytes) -> DatasetDescription:
        """Read a description from the text of ``dataset.json``.

        Raises:
            UnsupportedFormat: the description has a format other than ``FORMAT``.
            ValueError: the text is not JSON, or a field is missing or of the wrong type.
        """
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("the file holds no JSON object")
        # Compared before anything else: other formats may have other fields.
        if content.get("format") != FORMAT:
            raise UnsupportedFormat(
                f"has format {content.get('format')}, this version reads {FORMAT}"
            )
        # Earlier versions wrote no digest.
        if not matches_digest(content):
            raise ValueError("checksum mismatch: it changed after it was written")
        # From the inside out: each level is checked before the next one uses its fields.
        splits = {}
        for name, split in _object(content.get("splits"), "splits").items():
            values = _object(split, f"splits.{name}")
            shards = values.get("shards")
            if not isinstance(shards, list):
                raise ValueError(f"splits.{name}.shards is not a list")
            records = [
                _record(ShardInfo, shard, f"splits.{name}.shards.{number}")
                for number, shard in enumerate(shards)
            ]
            splits[name] = _record(SplitDescription, values | {"shards": records}, f"splits.{name}")
        return _record(cls, content | {"splits": splits}, "")

    @classmethod
    def read(cls, directory: Path) -> DatasetDescription:
        """Read ``dataset.json`` of a directory.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it cannot be used, see `parse`.
        """
        return cls.parse((directory / DATASET_JSON).read_bytes())

    def write(self, directory: Path) -> None:
        """Write ``dataset.json`` atomically, after ``classes.json``. Raises OSError."""
        classes_digest = file_digest(directory / CLASSES_JSON)
        values = asdict(self) | {"classes_digest": classes_digest}
        write_json(directory / DATASET_JSON, with_digest(values))

    def reported_split(self) -> str:
        """The split whose accuracy is the result of a run: test, or validation without one."""
        return "test" if "test" in self.splits else "validation"

    def selection_split(self) -> str | None:
        """The split that chooses the best checkpoint; None if the dataset has none to spare.

        Never the reported one: the best of many checkpoints on a split is better there than on
        images that had no part in the choice.

            train, validation               reported: validation   selection: None
            train, selection, validation    reported: validation   selection: selection
            train, validation, test         reported: test         selection: validation
        """
        if "selection" in self.splits:
            return "selection"
        return "validation" if self.reported_split() == "test" else None

    def shards(self) -> Iterator[ShardInfo]:
        """The shards of every split."""
        for split in self.splits.values():
            yield from split.shards


def _object(value: object, path: str) -> dict[str, object]:
    """``value`` if it is a JSON object. Raises ValueError otherwise, and names its ``path``."""
    if value is None:
        raise ValueError(f"{path} is missing")
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not an object")
    return value


def _record(kind: type[Record], value: object, path: str) -> Record:
    """A dataclass ``kind`` from a JSON object.

    Checks the outermost type of each field: ``list[int]`` must be a list. Ignores unknown keys, so
    that a later version may add some.

    Raises:
        ValueError: a field is missing or has the wrong type; names it, with ``path`` as prefix.
    """
    values = _object(value, path)
    hints = get_type_hints(kind)
    known: dict[str, object] = {}
    for entry in dataclasses.fields(kind):  # type: ignore[arg-type]  # every kind is a dataclass
        field_path = f"{path}.{entry.name}" if path else entry.name
        if entry.name in values:
            # list[int] -> list, int -> int: isinstance cannot look inside a container.
            expected = get_origin(hints[entry.name]) or hints[entry.name]
            if not isinstance(values[entry.name], expected):
                raise ValueError(f"{field_path} is not of type {expected.__name__}")
            known[entry.name] = values[entry.name]
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise ValueError(f"{field_path} is missing")
    return kind(**known)
