"""The same source gives the same bytes, whatever happens during preparation."""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from pipeline.config.schema import DatasetConfig, SyntheticConfig
from pipeline.files import write_json
from pipeline.prepare.fingerprint import fingerprint
from pipeline.prepare.verify import verify_dataset
from pipeline.sources import units
from pipeline.sources.units import Survey
from tests.prepare.results import description
from tests.prepare.source_folders import (
    backwards,
    class_tars,
    images,
    prepare,
    serial,
    shard_bytes,
    write_tar,
)


def test_bytes_depend_on_images_settings_and_seed_alone(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in", count=50)
    prepare(source, tmp_path / "a", shard_rows=40)
    shutil.copytree(source, tmp_path / "elsewhere")
    prepare(tmp_path / "elsewhere", tmp_path / "b", tasks=backwards, shard_rows=40)
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")
    prepare(source, tmp_path / "c", shard_rows=40, seed=1)
    assert shard_bytes(tmp_path / "a") != shard_bytes(tmp_path / "c")


def test_an_interrupted_preparation_ends_with_the_same_bytes_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    source = class_tars(tmp_path / "in", count=30)
    write_tar(source / "train" / "c0.tar", {**images(0, 30), "bad.JPEG": b"no"})
    prepare(source, tmp_path / "uninterrupted", shard_rows=20)
    expected = shard_bytes(tmp_path / "uninterrupted")
    for seed in range(6):
        target = tmp_path / f"out{seed}"
        for attempt in range(4):
            with contextlib.suppress(Killed):
                prepare(
                    source,
                    target,
                    tasks=_killed_tasks(random.Random(10 * seed + attempt), target),
                    shard_rows=20,
                )
        prepare(source, target, shard_rows=20)
        assert shard_bytes(target) == expected


class Killed(BaseException):
    """Stands for the kill signal."""


def _killed_tasks(choices: random.Random, target: Path) -> Any:
    """Tasks that are killed at a random moment and leave half a file behind."""

    def tasks(function: Any, items: Any) -> Any:
        for item in items:
            result = function(item)
            if choices.random() < 0.15 and (target / "work").exists():
                (target / "work" / ".unit-000000.parquet.1.tmp").write_bytes(b"half")
                raise Killed
            yield item, result

    return tasks


@pytest.mark.parametrize("damage", ["deleted", "truncated", "flipped"])
def test_a_damaged_shard_is_reported_and_written_again(tmp_path: Path, damage: str) -> None:
    source = class_tars(tmp_path / "in")
    prepare(source, tmp_path / "out", shard_rows=20)
    expected = shard_bytes(tmp_path / "out")
    shard = tmp_path / "out" / "train-00001.parquet"
    data = shard.read_bytes()
    if damage == "deleted":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(data[:-100])
    else:
        shard.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    (problem,) = verify_dataset(tmp_path / "out", serial, lambda *_: None)
    assert "train-00001.parquet" in problem
    written = (tmp_path / "out" / "train-00000.parquet").stat().st_mtime_ns
    prepare(source, tmp_path / "out", shard_rows=20)
    assert shard_bytes(tmp_path / "out") == expected
    assert (tmp_path / "out" / "train-00000.parquet").stat().st_mtime_ns == written


def test_a_dataset_of_other_settings_is_renamed(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in")
    prepare(source, tmp_path / "out", shard_rows=20)
    old = shard_bytes(tmp_path / "out")
    prepare(source, tmp_path / "out", shard_rows=30)
    assert shard_bytes(renamed_dataset(tmp_path)) == old
    assert not (tmp_path / "out" / "train-00002.parquet").exists()


def renamed_dataset(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.name.startswith("out.replaced-"))


def test_a_dataset_of_an_older_format_is_renamed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    old = {"format": 1, "fingerprint": "old"}
    write_json(tmp_path / "out" / "dataset.json", old)
    prepare(class_tars(tmp_path / "in"), tmp_path / "out")
    assert description(renamed_dataset(tmp_path)) == old


def test_a_dataset_with_an_incomplete_description_is_built_again(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in")
    prepare(source, tmp_path / "out")
    expected = shard_bytes(tmp_path / "out")
    values = description(tmp_path / "out")
    del values["splits"]
    write_json(tmp_path / "out" / "dataset.json", values)
    prepare(source, tmp_path / "out")
    assert shard_bytes(tmp_path / "out") == expected


class LaterDataset(DatasetConfig):
    """The schema after an upgrade that adds a key."""

    gamma: float = Field(1.0, description="A new key.")


def test_a_key_that_an_upgrade_adds_leaves_every_fingerprint_as_it_is() -> None:
    # 93a9...: computed by version 0.1.0 from the same values.
    source = Survey(
        layout="x", classes=[("a", "a")], units=[], fingerprint_items=[("a",)], notes=[]
    )
    before = "93a902648c785944db05d084fbab7241"
    assert fingerprint(source, DatasetConfig(root="/x", min_side=16), 0) == before
    assert fingerprint(source, LaterDataset(root="/y", min_side=16), 0) == before
    assert fingerprint(source, LaterDataset(min_side=16, gamma=2.0), 0) != before
    assert fingerprint(source, DatasetConfig(min_side=16, max_rejected=0.5), 0) == before


def test_a_key_that_an_upgrade_adds_leaves_synthetic_images_as_they_are() -> None:
    class LaterSynthetic(SyntheticConfig):
        gamma: float = Field(1.0, description="A new key.")

    assert LaterSynthetic(classes=5).digest_values() == SyntheticConfig(classes=5).digest_values()
    assert LaterSynthetic(gamma=2.0).digest_values()["gamma"] == 2.0
    assert SyntheticConfig().digest_values() == SyntheticConfig().model_dump(mode="json")
