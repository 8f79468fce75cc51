"""What is kept of a unit: its record (counts, statistics, rejected files), and tables of its files.

The presence of the record says that the unit is done.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np

from pipeline.config.schema import DatasetConfig
from pipeline.data.shards import ShardInfo
from pipeline.files import write_json
from pipeline.prepare.context import BuildContext

# What the plan needs of an image: xxh3-128 of its bytes in two halves, xxh3-64 of its key (with the
# seed), and its class index. 28 bytes, so 14 million images take 400 MB on disk and never lie in
# memory together.
IMAGE_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("key", "<u8"), ("label", "<i4")])

# What it takes to apply other size limits (see ``recheck``), one record per file of the unit, kept
# or rejected, in the order of the source. ``key``, ``label``: as above. ``width``, ``height``: of
# the image in the source, 0 if unknown. ``change``: index in CHANGES. ``content``: xxh3-64 of a
# rejected file.
MEMBER_RECORD = np.dtype(
    [
        ("is_kept", "?"),
        ("key", "<u8"),
        ("label", "<i4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("change", "u1"),
        ("moments", "<f8", (6,)),
        ("content", "<u8"),
    ]
)


class QuarantineEntry(TypedDict):
    """One line of quarantine/rejected.jsonl.

    ``file``: in the quarantine, empty if nothing was kept. ``left_out.jsonl`` has the same lines.
    """

    key: str
    reason: str
    detail: str
    file: str


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """The result of one unit.

    ``left_out``: files that were never meant to be images. ``changed``: images by conversion.
    ``moments``: sums over its images of the six numbers in ``CleanImage.moments``. ``sides``:
    images by short side, in steps of 32 pixels. ``limits``: the size limits by which images were
    rejected (``size_limits``). ``content``: digest of names and bytes of its files in the source.
    Records of version 0.1.0 lack the last two.
    """

    images: int
    shard: ShardInfo
    rejected: list[QuarantineEntry]
    changed: dict[str, int]
    moments: list[float]
    sides: dict[str, int]
    limits: dict[str, int] = field(default_factory=dict)
    content: str = ""
    left_out: list[QuarantineEntry] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> UnitRecord:
        """Raises FileNotFoundError, or ValueError if the record is damaged."""
        try:
            values = json.loads(path.read_text())
            return cls(**(values | {"shard": ShardInfo(**values["shard"])}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"is incomplete: {error}") from None

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))


def size_limits(config: DatasetConfig) -> dict[str, int]:
    """The keys that reject images for their size."""
    return {"min_side": config.min_side, "max_pixels": config.max_pixels}


def finished_unit(context: BuildContext, unit: int) -> UnitRecord | None:
    """The record of a finished unit; None if the unit has to be extracted (again)."""
    try:
        record = UnitRecord.read(context.unit_record(unit))
        size = context.unit_shard(unit).stat().st_size
    except (FileNotFoundError, ValueError):
        return None
    is_complete = size == record.shard.bytes and context.image_records(unit).exists()
    return record if is_complete else None
