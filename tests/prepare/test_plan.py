"""The plan equals a simple one in memory, for any hashes, buckets and interruptions."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.schema import DatasetConfig
from pipeline.data.hashing import key_of, mix
from pipeline.prepare import buckets, plan, shuffle
from pipeline.prepare.context import BuildContext
from pipeline.prepare.plan import DROP_REASONS, make_plan, read_order
from pipeline.prepare.splits import SPLITS
from pipeline.prepare.unit_record import IMAGE_RECORD
from pipeline.sources import units
from pipeline.sources.layouts import class_tars as class_tars_layout
from pipeline.sources.units import SplitName, Unit
from tests.prepare.scale import REPEATS
from tests.prepare.source_folders import class_tars, images, prepare, shard_bytes, write_tar

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 3
Record = tuple[int, int, int, int]  # high, low, key, label
UnitRecords = Sequence[tuple[SplitName, Sequence[Record]]]  # of each unit
RowRef = tuple[int, int]  # unit, row
SplitRow = tuple[RowRef, str, Record]

REPEATED_HASHES = st.sampled_from([0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
ANY_HASHES = st.one_of(REPEATED_HASHES, st.integers(0, 2**64 - 1))
RECORD = st.tuples(
    REPEATED_HASHES,
    st.one_of(st.integers(0, 3), ANY_HASHES),
    ANY_HASHES,
    st.integers(0, CLASSES - 1),
)
RECORDS_OF_UNITS = st.lists(
    st.tuples(st.sampled_from(["train", "validation", "test", ""]), st.lists(RECORD, max_size=12)),
    max_size=8,
)


def simple_plan(
    records: UnitRecords, config: DatasetConfig, seed: int
) -> tuple[dict[str, list[RowRef]], dict[str, list[RowRef]]]:
    """The plan, made with dictionaries: images dropped by reason, images of a shard by file."""
    rows = list(_rows(records, config, seed))
    contents = {name: {record[:2] for _, split, record in rows if split == name} for name in SPLITS}
    first_of_key: dict[int, RowRef] = {}
    first_of_content: dict[Any, RowRef] = {}
    for row_ref, split, (high, low, key, label) in rows:
        first_of_key.setdefault(key, row_ref)
        first_of_content.setdefault((high, low, split, label), row_ref)
    dropped: dict[str, list[RowRef]] = {}
    kept: dict[str, list[tuple[int, RowRef]]] = {name: [] for name in SPLITS}
    for row_ref, split, (high, low, key, label) in rows:
        if first_of_key[key] != row_ref:
            dropped.setdefault("duplicate_name", []).append(row_ref)
        elif split != "test" and (high, low) in contents["test"]:
            dropped.setdefault("in_test", []).append(row_ref)
        elif split in ("train", "selection") and (high, low) in contents["validation"]:
            dropped.setdefault("in_validation", []).append(row_ref)
        elif first_of_content[high, low, split, label] != row_ref:
            dropped.setdefault("duplicate", []).append(row_ref)
        else:
            kept[split].append((key, row_ref))
    shards = {}
    for name in SPLITS:
        order = [row_ref for _, row_ref in sorted(kept[name])]
        count = -(-len(order) // config.shard_rows)
        for i in range(count):
            rows_of = slice(len(order) * i // count, len(order) * (i + 1) // count)
            shards[f"{name}-{i:05d}.parquet"] = order[rows_of]
    return dropped, shards


def _rows(records: UnitRecords, config: DatasetConfig, seed: int) -> Iterator[SplitRow]:
    has_test = any(split == "test" for split, _ in records)
    shares = {
        "validation": config.validation_fraction,
        "selection": 0 if has_test else config.selection_fraction,
    }

    def is_held_out(low: int, split: str) -> bool:
        return _hash(low, split, seed) < min(int(shares[split] * 2.0**64), 2**64 - 1)

    def split_of(own_split: str, low: int) -> str:
        if own_split == "" and is_held_out(low, "validation"):
            return "validation"
        if own_split in ("", "train"):
            return "selection" if is_held_out(low, "selection") else "train"
        return own_split

    rows = [
        ((unit, row), split_of(split, record[1]), record)
        for unit, (split, unit_records) in enumerate(records)
        for row, record in enumerate(unit_records)
    ]
    restored = {"selection": _restored(rows, "selection", seed)}
    # Of a validation split of the source's own, no image is given back.
    if {split for split, _ in records} <= {"", "test"}:
        restored["validation"] = _restored(rows, "validation", seed)
    for row_ref, split, record in rows:
        is_restored = record[:2] in restored.get(split, ())
        yield row_ref, "train" if is_restored else split, record


def _hash(low: int, split: str, seed: int) -> int:
    return mix(low ^ key_of(split, seed))


def _restored(rows: Sequence[SplitRow], giving: str, seed: int) -> set[tuple[int, int]]:
    """Contents of a split that go back to training: their class has no other image above it."""
    code = SPLITS.index(giving)
    held_out = {record[:2] for _, split, record in rows if split in SPLITS[code + 1 :]}
    restored = set()
    for label in range(CLASSES):
        left = [
            (split, record[:2])
            for _, split, record in rows
            if record[3] == label and record[:2] not in held_out
        ]
        selected = [content for split, content in left if split == giving]
        if selected and not {split for split, _ in left} & {*SPLITS[:code]}:
            largest = max((_hash(content[1], giving, seed), content) for content in selected)
            restored.add(largest[1])
    return restored


def write_units(
    folder: Path, records: UnitRecords, config: DatasetConfig, seed: int
) -> tuple[BuildContext, list[Unit], np.ndarray[Any, Any]]:
    context = BuildContext(
        target=folder, config=config, fingerprint="", units_fingerprint="", seed=seed
    )
    context.work.mkdir(exist_ok=True)
    for number, (_, rows) in enumerate(records):
        np.save(context.image_records(number), np.array(rows, dtype=IMAGE_RECORD))
    unit_list = [Unit(number, split, ()) for number, (split, _) in enumerate(records)]
    return context, unit_list, np.array([len(rows) for _, rows in records], dtype=np.int64)


@settings(deadline=None, max_examples=100)
@given(
    records=RECORDS_OF_UNITS,
    bucket_rows=st.sampled_from([1, 2, 7, 1 << 20]),
    chunk_rows=st.sampled_from([1, 5, 1 << 18]),
    shard_rows=st.integers(1, 9),
    fraction=st.sampled_from([0.0, 0.1, 0.5]),
    selection=st.sampled_from([0.0, 0.5, 0.9]),
    seed=st.integers(0, 3),
)
def test_the_plan_equals_the_simple_one(
    records: UnitRecords,
    bucket_rows: int,
    chunk_rows: int,
    shard_rows: int,
    fraction: float,
    selection: float,
    seed: int,
) -> None:
    config = DatasetConfig(
        root="",
        shard_rows=shard_rows,
        validation_fraction=fraction,
        selection_fraction=selection,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(buckets, "BUCKET_ROWS", bucket_rows),
        mock.patch.object(plan, "CHUNK_ROWS", chunk_rows),
    ):
        context, unit_list, counts = write_units(Path(folder), records, config, seed)
        result = make_plan(context, unit_list, counts, CLASSES)
        shards = {shard.file: read_order(context, shard).tolist() for shard in result.shards}
        drop_reasons = np.load(context.drop_reasons).tolist()
        assert sorted(
            path.name for path in context.work.iterdir() if not path.name.startswith("unit-")
        ) == [
            "drop_reasons.npy",
            "selection.order",
            "test.order",
            "train.order",
            "validation.order",
        ]
    dropped, expected = simple_plan(records, config, seed)
    assert shards == expected
    assert result.dropped == {
        reason: len(dropped[reason]) for reason in DROP_REASONS if reason in dropped
    }
    row_refs = [(unit, row) for unit, (_, rows) in enumerate(records) for row in range(len(rows))]
    for code, reason in enumerate(DROP_REASONS, 1):
        assert [
            row_ref
            for row_ref, drop_code in zip(row_refs, drop_reasons, strict=True)
            if drop_code == code
        ] == dropped.get(reason, [])
    for name in SPLITS:
        labels = Counter(
            records[unit][1][row][3]
            for file, rows in expected.items()
            if file.startswith(name)
            for unit, row in rows
        )
        assert result.labels[name].tolist() == [labels[label] for label in range(CLASSES)]


def test_buckets_are_equal_ranges_of_the_hash(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64)
    records = np.array(
        [(value, i) for i, value in enumerate(values)], dtype=[("hash", "<u8"), ("number", "<i8")]
    )
    target = buckets.Buckets(tmp_path, "hash", 7, records.dtype)
    for first in range(0, 5000, 999):
        target.add(records[first : first + 999])
    read = list(target)
    assert len(read) == 7
    assert max(map(len, read)) < 1.2 * 5000 / 7
    assert np.array_equal(
        np.concatenate([np.sort(bucket["hash"]) for bucket in read]), np.sort(values)
    )
    assert all((np.diff(bucket["number"]) > 0).all() for bucket in read)
    assert not list(tmp_path.iterdir())
    assert [buckets.bucket_count(rows) for rows in (0, 1, 1 << 20, 14_000_000)] == [1, 1, 1, 14]


def _source(root: Path) -> Path:
    """Two splits in many units, with every kind of dropped image and a file that is no image."""
    class_tars(root, count=24)
    first = images(0, 24)
    leaked = images(0, 6, first=500)["c0_2.JPEG"]
    write_tar(
        root / "train" / "c0.tar",
        {**first, "again.JPEG": first["c0_3.JPEG"], "leak.JPEG": leaked, "bad.JPEG": b"no"},
    )
    return root


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for module in (class_tars_layout, units):
        monkeypatch.setattr(module, "UNIT_BYTES", 8000)
    return monkeypatch


def _use_small_buckets(patch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (buckets, "BUCKET_ROWS", 9),
        (plan, "CHUNK_ROWS", 20),
        (shuffle, "MAX_OPEN_UNITS", 2),
    ):
        patch.setattr(module, name, value)


def test_bucket_size_and_open_files_do_not_change_a_byte(
    tmp_path: Path, small_units: pytest.MonkeyPatch
) -> None:
    source = _source(tmp_path / "in")
    prepare(source, tmp_path / "whole", shard_rows=20)
    _use_small_buckets(small_units)
    prepare(source, tmp_path / "cut", shard_rows=20)
    assert shard_bytes(tmp_path / "cut") == shard_bytes(tmp_path / "whole")


def test_rejected_images_are_listed_by_unit_then_by_reason(
    tmp_path: Path, small_units: pytest.MonkeyPatch
) -> None:
    source = _source(tmp_path / "in")
    doubled = images(1, 24)
    write_tar(
        source / "train" / "c1.tar", {**doubled, "z.JPEG": doubled["c1_9.JPEG"], "bad.JPEG": b""}
    )
    _use_small_buckets(small_units)
    prepare(source, tmp_path / "out")
    listed = [
        json.loads(line)
        for line in (tmp_path / "out" / "quarantine" / "rejected.jsonl").read_text().splitlines()
    ]
    assert [(entry["key"], entry["reason"]) for entry in listed] == [
        ("train/c0/bad.JPEG", "not_an_image"),
        ("train/c1/bad.JPEG", "empty"),
        ("train/c0/leak.JPEG", "in_validation"),
        ("train/c0/again.JPEG", "duplicate"),
        ("train/c1/z.JPEG", "duplicate"),
    ]


class Killed(BaseException):
    """Stands for the kill signal."""


@pytest.mark.parametrize(
    "moment", ["_plan_records", "_find_repeated_contents", "_write_orders", "fsync_dir"]
)
def test_an_interrupted_plan_is_made_from_scratch(
    moment: str, tmp_path: Path, small_units: pytest.MonkeyPatch
) -> None:
    _use_small_buckets(small_units)
    source = _source(tmp_path / "in")
    prepare(source, tmp_path / "uninterrupted", shard_rows=20)
    whole = getattr(plan, moment)
    for calls in (0, 1):  # killed before the first call, and before the second
        remaining = iter(range(calls))

        def dying(*args: Any, remaining: Iterator[int] = remaining) -> Any:
            if next(remaining, None) is None:
                raise Killed
            return whole(*args)

        with mock.patch.object(plan, moment, dying), pytest.raises(Killed):
            prepare(source, tmp_path / "out", shard_rows=20)
            raise Killed  # the function was called only once
    prepare(source, tmp_path / "out", shard_rows=20)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "uninterrupted")


@pytest.mark.parametrize(
    ("count", "unit_rows"), [(700_000, 512), pytest.param(14_000_000, 4096, marks=pytest.mark.slow)]
)
def test_memory_does_not_grow_with_the_number_of_images(
    count: int, unit_rows: int, tmp_path: Path
) -> None:
    """The driver's own work, without images, in a process of its own. Its imports take 100 MB."""
    command = [
        sys.executable,
        "-m",
        "tests.prepare.scale",
        str(tmp_path / "set"),
        str(count),
        str(unit_rows),
    ]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    metrics = json.loads(process.stdout)
    units_with_repeats = -(-count // unit_rows // REPEATS)
    assert metrics["images"] + metrics["validation"] + metrics["duplicates"] == count
    # Each has a repeated content and a repeated name. The content counts only if both images are
    # in the same split, which is drawn per image here.
    assert units_with_repeats <= metrics["duplicates"] <= 2 * units_with_repeats
    assert metrics["peak_mb"] < 600
