"""The plan against a plain one in memory, for any facts, buckets and interruptions; and how little memory it takes."""

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
from pipeline.prepare import buckets, plan
from pipeline.prepare import shuffle as mixing
from pipeline.prepare.extract import FACTS, BuildContext
from pipeline.prepare.plan import REASONS, SPLITS, make_plan, read_order
from pipeline.sources import survey, units
from pipeline.sources.units import SplitName, Unit
from tests.prepare.scale import REPEATS
from tests.prepare.source_folders import class_tars, images, prepare, shard_bytes, write_tar

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 3
Fact = tuple[int, int, int, int]  # high, low, key, label
Facts = Sequence[tuple[SplitName, Sequence[Fact]]]  # of each unit
Where = tuple[int, int]  # unit, row

FEW = st.sampled_from([0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
SOME = st.one_of(FEW, st.integers(0, 2**64 - 1))
FACT = st.tuples(FEW, st.one_of(st.integers(0, 3), SOME), SOME, st.integers(0, CLASSES - 1))
FACTS_OF_UNITS = st.lists(
    st.tuples(st.sampled_from(["train", "validation", ""]), st.lists(FACT, max_size=12)), max_size=8
)


def plain_plan(
    facts: Facts, config: DatasetConfig, seed: int
) -> tuple[dict[str, list[Where]], dict[str, list[Where]]]:
    """What the plan says, in dictionaries of Python: reason -> images dropped, file -> images of a shard."""
    rows = [(where, split, fact) for where, split, fact in _rows(facts, config, seed)]
    held_out = {fact[:2] for _, split, fact in rows if split == "validation"}
    first_of_key: dict[int, Where] = {}
    first_of_content: dict[Any, Where] = {}
    for where, split, (high, low, key, label) in rows:
        first_of_key.setdefault(key, where)
        first_of_content.setdefault((high, low, split, label), where)
    dropped: dict[str, list[Where]] = {}
    kept: dict[str, list[tuple[int, Where]]] = {name: [] for name in SPLITS}
    for where, split, (high, low, key, label) in rows:
        if first_of_key[key] != where:
            dropped.setdefault("duplicate_name", []).append(where)
        elif split == "train" and (high, low) in held_out:
            dropped.setdefault("in_validation", []).append(where)
        elif first_of_content[high, low, split, label] != where:
            dropped.setdefault("duplicate", []).append(where)
        else:
            kept[split].append((key, where))
    shards = {}
    for name in SPLITS:
        order = [where for _, where in sorted(kept[name])]
        count = -(-len(order) // config.shard_rows)
        for i in range(count):
            rows_of = slice(len(order) * i // count, len(order) * (i + 1) // count)
            shards[f"{name}-{i:05d}.parquet"] = order[rows_of]
    return dropped, shards


def _rows(facts: Facts, config: DatasetConfig, seed: int) -> Iterator[tuple[Where, str, Fact]]:
    limit = min(int(config.validation_fraction * 2.0**64), 2**64 - 1)
    for unit, (split, rows) in enumerate(facts):
        for row, fact in enumerate(rows):
            hashed = mix(fact[1] ^ key_of("validation", seed))
            yield (unit, row), split or ("validation" if hashed < limit else "train"), fact


def spilled(
    folder: Path, facts: Facts, config: DatasetConfig, seed: int
) -> tuple[BuildContext, list[Unit], np.ndarray[Any, Any]]:
    place = BuildContext(folder, config, "", seed)
    place.work.mkdir(exist_ok=True)
    for number, (_, rows) in enumerate(facts):
        np.save(place.facts(number), np.array(rows, dtype=FACTS))
    listed = [Unit(number, split, ()) for number, (split, _) in enumerate(facts)]
    return place, listed, np.array([len(rows) for _, rows in facts], dtype=np.int64)


@settings(deadline=None, max_examples=100)
@given(
    FACTS_OF_UNITS,
    st.sampled_from([1, 2, 7, 1 << 20]),
    st.sampled_from([1, 5, 1 << 18]),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.integers(0, 3),
)
def test_the_plan_is_the_plain_one(
    facts: Facts, bucket_rows: int, chunk_rows: int, shard_rows: int, fraction: float, seed: int
) -> None:
    config = DatasetConfig(root="", shard_rows=shard_rows, validation_fraction=fraction)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(buckets, "BUCKET_ROWS", bucket_rows),
        mock.patch.object(plan, "CHUNK_ROWS", chunk_rows),
    ):
        place, listed, counts = spilled(Path(folder), facts, config, seed)
        found = make_plan(place, listed, counts, CLASSES)
        shards = {shard.file: read_order(place, shard).tolist() for shard in found.shards}
        fates = np.load(place.fates).tolist()
        assert sorted(
            path.name for path in place.work.iterdir() if not path.name.startswith("unit-")
        ) == [
            "fates.npy",
            "train.order",
            "validation.order",
        ]
    dropped, wanted = plain_plan(facts, config, seed)
    assert shards == wanted
    assert found.dropped == {
        reason: len(dropped[reason]) for reason in REASONS if reason in dropped
    }
    places = [(unit, row) for unit, (_, rows) in enumerate(facts) for row in range(len(rows))]
    for fate, reason in enumerate(REASONS, 1):
        assert [
            where for where, one in zip(places, fates, strict=True) if one == fate
        ] == dropped.get(reason, [])
    for name in SPLITS:
        labels = Counter(
            facts[unit][1][row][3]
            for file, rows in wanted.items()
            if file.startswith(name)
            for unit, row in rows
        )
        assert found.labels[name].tolist() == [labels[label] for label in range(CLASSES)]


def test_buckets_are_ranges_of_their_hash(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64)
    records = np.array(
        [(value, i) for i, value in enumerate(values)], dtype=[("hash", "<u8"), ("number", "<i8")]
    )
    made = buckets.Buckets(tmp_path, "hash", 7, records.dtype)
    for first in range(0, 5000, 999):
        made.add(records[first : first + 999])
    found = list(made)
    assert len(found) == 7
    assert max(map(len, found)) < 1.2 * 5000 / 7
    assert np.array_equal(
        np.concatenate([np.sort(bucket["hash"]) for bucket in found]), np.sort(values)
    )
    assert all((np.diff(bucket["number"]) > 0).all() for bucket in found)
    assert not list(tmp_path.iterdir())
    assert [buckets.bucket_count(rows) for rows in (0, 1, 1 << 20, 14_000_000)] == [1, 1, 1, 14]


def _source(root: Path) -> Path:
    """Two splits with everything that a plan drops, and files that are no images, in many units."""
    class_tars(root, count=24)
    first = images(0, 24)
    leaked = images(0, 6, first=500)["c0_2.JPEG"]
    write_tar(
        root / "train" / "c0.tar",
        {**first, "again.JPEG": first["c0_3.JPEG"], "leak.JPEG": leaked, "bad.JPEG": b"no"},
    )
    return root


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for module in (survey, units):
        monkeypatch.setattr(module, "UNIT_BYTES", 8000)
    return monkeypatch


def _small_pieces(patch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (buckets, "BUCKET_ROWS", 9),
        (plan, "CHUNK_ROWS", 20),
        (mixing, "OPEN_SPILLS", 2),
    ):
        patch.setattr(module, name, value)


def test_buckets_and_open_files_do_not_change_a_byte(
    tmp_path: Path, cut: pytest.MonkeyPatch
) -> None:
    source = _source(tmp_path / "in")
    prepare(source, tmp_path / "whole", shard_rows=20)
    _small_pieces(cut)
    prepare(source, tmp_path / "cut", shard_rows=20)
    assert shard_bytes(tmp_path / "cut") == shard_bytes(tmp_path / "whole")


def test_the_rejected_are_listed_by_unit_then_by_reason(
    tmp_path: Path, cut: pytest.MonkeyPatch
) -> None:
    source = _source(tmp_path / "in")
    doubled = images(1, 24)
    write_tar(
        source / "train" / "c1.tar", {**doubled, "z.JPEG": doubled["c1_9.JPEG"], "bad.JPEG": b""}
    )
    _small_pieces(cut)
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
    """In place of a signal."""


@pytest.mark.parametrize("moment", ["_members", "_repeated_contents", "_order", "fsync_dir"])
def test_an_interrupted_plan_is_made_again(
    moment: str, tmp_path: Path, cut: pytest.MonkeyPatch
) -> None:
    _small_pieces(cut)
    source = _source(tmp_path / "in")
    prepare(source, tmp_path / "undisturbed", shard_rows=20)
    whole = getattr(plan, moment)
    for calls in (0, 1):  # before it, and after its first
        left = iter(range(calls))

        def dying(*args: Any, left: Iterator[int] = left) -> Any:
            if next(left, None) is None:
                raise Killed
            return whole(*args)

        with mock.patch.object(plan, moment, dying), pytest.raises(Killed):
            prepare(source, tmp_path / "out", shard_rows=20)
            raise Killed  # called once only
    prepare(source, tmp_path / "out", shard_rows=20)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("count", "unit_rows"), [(700_000, 512), pytest.param(14_000_000, 4096, marks=pytest.mark.slow)]
)
def test_memory_does_not_grow_with_the_images(count: int, unit_rows: int, tmp_path: Path) -> None:
    """The driver's whole work but for the images themselves, in a process of its own: 280 and 390 MB when written, of which
    its imports are 100."""
    command = [
        sys.executable,
        "-m",
        "tests.prepare.scale",
        str(tmp_path / "set"),
        str(count),
        str(unit_rows),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    metrics = json.loads(done.stdout)
    repeated = -(-count // unit_rows // REPEATS)  # units
    assert metrics["images"] + metrics["validation"] + metrics["duplicates"] == count
    assert (
        repeated <= metrics["duplicates"] <= 2 * repeated
    )  # where the two of a name are of one split
    assert metrics["peak_mb"] < 600
