"""What every step of building one dataset needs: its settings, and where its files lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import DatasetConfig


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """Settings and paths of one dataset under construction. Travels to the workers.

    <target>/work/                     deleted when the dataset is complete
      fingerprint                      of the dataset that the work belongs to
      units                            what its units depend on (units_fingerprint)
      unit-000000.parquet, .idx        images of one unit, written by the first phase
      unit-000000.npy                  hashes and labels of these images (IMAGE_RECORD)
      unit-000000.members.npy          what is known of every file of the unit (MEMBER_RECORD)
      unit-000000.json                 record of the unit, written last
      drop_reasons.npy                 one byte per image of all units
      train.order, validation.order    which image of which unit comes where
      train-00000.parquet.json         record of a finished shard
    """

    target: Path
    config: DatasetConfig
    fingerprint: str
    units_fingerprint: str
    seed: int

    @property
    def work(self) -> Path:
        return self.target / "work"

    @property
    def stamp(self) -> Path:
        """The fingerprint that the work folder belongs to."""
        return self.work / "fingerprint"

    @property
    def units_stamp(self) -> Path:
        """The ``units_fingerprint`` that the units of the work folder belong to."""
        return self.work / "units"

    @property
    def quarantine(self) -> Path:
        return self.target / "quarantine"

    @property
    def quarantine_list(self) -> Path:
        """One JSON object per image that is left out (``QuarantineEntry``)."""
        return self.quarantine / "rejected.jsonl"

    @property
    def left_out_list(self) -> Path:
        """One JSON object per file that is no image and does not look like one."""
        return self.quarantine / "left_out.jsonl"

    def unit_shard(self, unit: int) -> Path:
        return self.work / f"unit-{unit:06d}.parquet"

    def unit_record(self, unit: int) -> Path:
        """Written last: where it exists, the unit is done."""
        return self.work / f"unit-{unit:06d}.json"

    def finished_units(self) -> int:
        """Number of units that have a record."""
        return sum(1 for _ in self.work.glob("unit-*.json"))

    def image_records(self, unit: int) -> Path:
        return self.work / f"unit-{unit:06d}.npy"

    def member_records(self, unit: int) -> Path:
        return self.work / f"unit-{unit:06d}.members.npy"

    @property
    def drop_reasons(self) -> Path:
        """uint8 per image of all units: KEPT, or why the plan drops it."""
        return self.work / "drop_reasons.npy"

    def order(self, split: str) -> Path:
        """Unit and row of each image of a split, in the order of its shards."""
        return self.work / f"{split}.order"

    def shard(self, file: str) -> Path:
        """A shard of the finished dataset."""
        return self.target / file

    def shard_record(self, file: str) -> Path:
        """Written after the shard: where it exists, the shard is done."""
        return self.work / f"{file}.json"

    def shard_records(self) -> list[Path]:
        """The records of all shards that are done."""
        return list(self.work.glob("*.parquet.json"))
