"""``dataset.json``: the one place that writes and reads the description of a prepared dataset."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.shards import FORMAT, ShardInfo
from pipeline.files import write_json
from pipeline.layout import DATASET_JSON


@dataclass(frozen=True, kw_only=True)
class SplitDescription:
    """One split: number of images, images of each class, and its shards in order."""

    images: int
    images_by_class: list[int]
    shards: list[ShardInfo]


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    """The content of ``dataset.json``.

    ``fingerprint``: digest of everything that the shards' bytes depend on. ``rejected``, ``duplicates``, ``changed``:
    images by reason. ``mean``, ``std``: per channel, of the training images (RGB in [0, 1]).
    """

    format: int
    fingerprint: str
    seed: int
    layout: str
    splits: dict[str, SplitDescription]
    classes: int
    rejected: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    images_by_short_side: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | bytes) -> DatasetDescription:
        """Raises ValueError if the text is not a description, or of another format than ``FORMAT``."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else None
            raise ValueError(f"has format {found}, this version reads {FORMAT}")
        try:
            splits = {
                name: SplitDescription(
                    images=split["images"],
                    images_by_class=split["images_by_class"],
                    shards=[ShardInfo(**shard) for shard in split["shards"]],
                )
                for name, split in values.pop("splits").items()
            }
            return cls(splits=splits, **values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"is incomplete: {error}") from None

    @classmethod
    def read(cls, directory: Path) -> DatasetDescription:
        """Raises FileNotFoundError if there is none, ValueError if it cannot be used."""
        return cls.parse((directory / DATASET_JSON).read_bytes())

    def write(self, directory: Path) -> None:
        write_json(directory / DATASET_JSON, asdict(self))

    def shards(self) -> Iterator[ShardInfo]:
        """The shards of every split."""
        for split in self.splits.values():
            yield from split.shards
