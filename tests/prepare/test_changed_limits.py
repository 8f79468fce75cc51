"""A refused or interrupted preparation continues with other limits, reading nothing twice: D10."""

from __future__ import annotations

import gzip
import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.sources import units
from tests.data.small_datasets import jpeg
from tests.prepare.results import description, keys_by_reason, quarantine_list
from tests.prepare.source_folders import images, prepare, shard_bytes, write_tar

NONE_MAY_BE_REJECTED: Mapping[str, Any] = {"max_rejected": 0.0, "min_side": 28}
ALL_UNITS = "set: 3 of 3 units were read by an earlier call"


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three units with images of three sizes, and files that no limit makes usable."""
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)  # a unit per tar, uncut
    large = {f"large{i}.JPEG": jpeg(300 + i, 64, 48) for i in range(4)}
    small = {f"small{i}.JPEG": jpeg(400 + i, 30, 24) for i in range(3)}
    unusable = {"cut.JPEG": jpeg(500, 64, 48)[:-200], "page.JPEG": b"<html>", "none.JPEG": b""}
    packed = {
        "packed.JPEG": gzip.compress(jpeg(501, 30, 24), mtime=0),
        "again.JPEG": small["small1.JPEG"],
    }
    write_tar(tmp_path / "in" / "c0.tar", {**images(0, 9), **small, **packed})
    write_tar(tmp_path / "in" / "c1.tar", {**large, **images(1, 9), "small.png": png(26, 26)})
    write_tar(tmp_path / "in" / "c2.tar", {**unusable, **images(2, 9), "middle.png": png(40, 40)})
    return tmp_path / "in"


def refused(source: Path, target: Path, **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        prepare(source, target, **{**NONE_MAY_BE_REJECTED, **settings})
    return caught.value


def make_unreadable(source: Path) -> None:
    """Overwrite the source. It counts as unchanged, because names and sizes stay."""
    for path in source.iterdir():
        path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_rejected": 1.0},
        {"min_side": 20},  # files in quarantine become images
        {"min_side": 24},
        {"max_pixels": 40 * 40},  # images become rejected files
        {"min_side": 20, "max_pixels": 40 * 40},
        {"validation_fraction": 0.4},
        {"selection_fraction": 0.3},
        {"shard_rows": 7},
    ],
    ids=str,
)
def test_after_a_refusal_nothing_is_read_again_and_the_bytes_are_those_of_a_first_call(
    source: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    present = {**NONE_MAY_BE_REJECTED, "max_rejected": 1.0, **settings}
    prepare(source, tmp_path / "first_call", **present)
    refused(source, tmp_path / "out")
    make_unreadable(source)
    notes: list[str] = []
    prepare(source, tmp_path / "out", notes=notes, **present)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "first_call")
    assert ALL_UNITS in notes


def test_a_first_call_does_not_claim_to_continue(source: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    prepare(source, tmp_path / "out", notes=notes)
    assert not [note for note in notes if "earlier call" in note]


def test_a_limit_may_change_several_times(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "first_call", min_side=20)
    for min_side in (28, 10, 26, 20):
        refused(source, tmp_path / "out", min_side=min_side)
        expected = {"too_small"} if min_side > 24 else set()
        assert {"truncated", "not_an_image", "empty"} | expected == set(
            keys_by_reason(tmp_path / "out")
        )
        quarantine = tmp_path / "out" / "quarantine"
        files = {str(path.relative_to(quarantine)) for path in quarantine.glob("*/*")}
        listed = {entry["file"] for entry in quarantine_list(tmp_path / "out")}
        assert files == listed - {""}
    make_unreadable(source)
    prepare(source, tmp_path / "out", min_side=20)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "first_call")


def test_an_image_is_listed_with_the_limit_that_rejects_it_now(
    source: Path, tmp_path: Path
) -> None:
    refused(source, tmp_path / "out")
    refused(source, tmp_path / "out", min_side=27)
    details = {entry["key"]: entry["detail"] for entry in quarantine_list(tmp_path / "out")}
    assert details["c0/small0.JPEG"] == "30 x 24 pixels, the shorter side at least 27"


def test_an_image_that_was_converted_is_read_again_when_it_is_rejected(
    source: Path, tmp_path: Path
) -> None:
    """The quarantine holds files as they are in the source, and a unit keeps converted ones."""
    prepare(source, tmp_path / "first_call", max_pixels=1500)
    refused(source, tmp_path / "out", min_side=16)
    notes: list[str] = []
    prepare(source, tmp_path / "out", notes=notes, max_pixels=1500)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "first_call")
    # Unit 2 holds a PNG of 40 x 40 pixels.
    assert "set: 2 of 3 units were read by an earlier call" in notes


@pytest.mark.parametrize("damage", ["deleted", "edited"])
def test_a_unit_whose_quarantine_was_changed_is_read_again(
    source: Path, tmp_path: Path, damage: str
) -> None:
    prepare(source, tmp_path / "first_call", min_side=20)
    refused(source, tmp_path / "out")
    files = {entry["key"]: entry["file"] for entry in quarantine_list(tmp_path / "out")}
    file = tmp_path / "out" / "quarantine" / files["c0/small2.JPEG"]
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(jpeg(9, 64, 48))
    notes: list[str] = []
    prepare(source, tmp_path / "out", notes=notes, min_side=20)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "first_call")
    assert "set: 2 of 3 units were read by an earlier call" in notes


class Killed(BaseException):
    """Stands for the kill signal."""


def killed_after(tasks_done: int) -> Any:
    """Tasks of which so many finish before the process is killed."""
    remaining = tasks_done

    def tasks(function: Any, items: Any) -> Any:
        nonlocal remaining
        for item in items:
            if not remaining:
                raise Killed
            remaining -= 1
            yield item, function(item)

    return tasks


@pytest.mark.parametrize("tasks_done", [1, 3, 4, 6])
@pytest.mark.parametrize("settings", [{"min_side": 20}, {"validation_fraction": 0.4}], ids=str)
def test_a_preparation_killed_at_any_task_continues_with_other_settings(
    source: Path, tmp_path: Path, tasks_done: int, settings: dict[str, Any]
) -> None:
    """Shards of the former settings have the same names and must not be taken for finished."""
    present = {"min_side": 28, "shard_rows": 9, **settings}
    prepare(source, tmp_path / "first_call", **present)
    for min_side in (28, 26):
        with pytest.raises(Killed):
            tasks = killed_after(tasks_done)
            prepare(source, tmp_path / "out", tasks=tasks, min_side=min_side, shard_rows=9)
    prepare(source, tmp_path / "out", **present)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "first_call")


def test_files_of_a_unit_that_was_cut_short_leave_the_quarantine(
    source: Path, tmp_path: Path
) -> None:
    prepare(source, tmp_path / "first_call", min_side=20)
    refused(source, tmp_path / "out")
    (tmp_path / "out/quarantine/too_small/cut_short-0123456789abcdef.JPEG").write_bytes(b"x")
    prepare(source, tmp_path / "out", min_side=20)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "first_call")


def test_other_settings_discard_the_units(source: Path, tmp_path: Path) -> None:
    refused(source, tmp_path / "out")
    notes: list[str] = []
    prepare(source, tmp_path / "out", notes=notes, short_side=24)
    assert not [note for note in notes if "earlier call" in note]
    assert description(tmp_path / "out")["changed"]["resized"] > 0


def test_work_of_version_0_1_0_serves_the_same_settings_only(source: Path, tmp_path: Path) -> None:
    """It has neither limits in its records nor tables of files, and one stamp."""
    prepare(source, tmp_path / "first_call", min_side=28)
    refused(source, tmp_path / "out")
    work = tmp_path / "out" / "work"
    (work / "units").unlink()
    for path in work.glob("unit-*.members.npy"):
        path.unlink()
    for path in work.glob("unit-*.json"):
        text = path.read_text()
        before, after = text.split(',\n  "limits": {')
        path.write_text(before + after.split("}", 1)[1])
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    notes: list[str] = []
    prepare(source, tmp_path / "out", notes=notes, min_side=28)
    assert ALL_UNITS in notes
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "first_call")
    prepare(source, tmp_path / "other", min_side=20)
    assert "too_small" not in keys_by_reason(tmp_path / "other")
