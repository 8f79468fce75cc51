"""Unusable and repeated images are left out, counted and listed (faults D1, D2 and D4)."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import pytest

from pipeline.config.schema import DatasetConfig, SyntheticConfig
from pipeline.errors import DataError
from pipeline.prepare import build
from pipeline.prepare.quarantine import quarantined_name
from pipeline.prepare.verify import verify_dataset
from pipeline.sources import units
from pipeline.synthetic import generate
from pipeline.synthetic.contents import CORRUPT_KINDS
from tests.data.small_datasets import jpeg
from tests.prepare.results import description, keys_by_reason, quarantine_list
from tests.prepare.source_folders import (
    class_tars,
    images,
    prepare,
    serial,
    write_tar,
)


@pytest.mark.parametrize("layout", ["class_tars", "class_folders", "imagenet_tars"])
def test_every_kind_of_corrupt_file_is_counted_under_its_reason(
    layout: str, tmp_path: Path
) -> None:
    synthetic = SyntheticConfig(
        classes=4,
        images_per_class=6,
        validation_per_class=3,
        min_size=48,
        max_size=80,
        corrupt_fraction=1.0,
    )
    config = DatasetConfig.model_validate({"layout": layout, "synthetic": synthetic})
    for file in generate.plan_files(config, tmp_path / "in"):
        generate.write_file(file)
    generate.finish_source(config, tmp_path / "in")
    assert generate.corrupt_counts(config) == dict.fromkeys(CORRUPT_KINDS, 2)
    metrics = prepare(tmp_path / "in", tmp_path / "out", layout=layout, min_side=32)
    values = description(tmp_path / "out")
    assert values["rejected"] == {
        "empty": 2,
        "not_an_image": 2,  # web pages
        "too_small": 2,
        "truncated": 2,
    }
    assert values["duplicates"] == {"duplicate": 2, "in_validation": 2}
    assert values["changed"] == {"converted": 6, "unpacked": 2}
    # 24 images and 24 corrupt files, less 8 rejected, 4 duplicates and 2 of operating systems.
    assert (metrics["images"], metrics["validation"]) == (24 + 24 - 8 - 4 - 2, 12)
    entries = quarantine_list(tmp_path / "out")
    assert len(entries) == 12
    assert all(entry["reason"] for entry in entries)
    assert all(entry["key"] for entry in entries)
    kept = [tmp_path / "out" / "quarantine" / entry["file"] for entry in entries if entry["file"]]
    assert len(kept) == 6
    assert all(path.is_file() for path in kept), "rejected files can be inspected"
    assert verify_dataset(tmp_path / "out", serial, lambda *_: None) == []


def test_duplicates_are_dropped_and_listed(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in")
    shared = images(0, 20)
    doubled = {
        **shared,
        "again.JPEG": shared["c0_3.JPEG"],
        "leak.JPEG": images(0, 6, first=500)["c0_2.JPEG"],
    }
    write_tar(source / "train" / "c0.tar", doubled)
    write_tar(
        source / "train" / "c1.tar", {**images(1, 20), "other_class.JPEG": shared["c0_4.JPEG"]}
    )
    metrics = prepare(source, tmp_path / "out")
    assert (metrics["images"], metrics["validation"], metrics["duplicates"]) == (61, 18, 2)
    assert keys_by_reason(tmp_path / "out") == {
        "duplicate": ["train/c0/again.JPEG"],
        "in_validation": ["train/c0/leak.JPEG"],
    }


def test_an_image_in_two_classes_is_kept_in_both_unless_it_is_in_validation(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in", classes=2)
    both = jpeg(700, 40, 32)
    held_out = images(1, 6, first=500)["c1_0.JPEG"]
    for label in range(2):
        write_tar(
            source / "train" / f"c{label}.tar",
            {**images(label, 20), "both.JPEG": both, "leak.JPEG": held_out},
        )
    prepare(source, tmp_path / "out")
    values = description(tmp_path / "out")
    assert values["duplicates"] == {"in_validation": 2}
    assert values["splits"]["train"]["images_by_class"] == [21, 21]


def test_of_two_files_with_the_same_name_the_first_is_kept(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in")
    with tarfile.open(source / "train" / "c0.tar", "a") as tar:
        info = tarfile.TarInfo("c0_3.JPEG")
        other = jpeg(77, 40, 32)
        info.size = len(other)
        tar.addfile(info, io.BytesIO(other))
    metrics = prepare(source, tmp_path / "out")
    assert (metrics["images"], metrics["duplicates"]) == (60, 1)
    assert keys_by_reason(tmp_path / "out") == {"duplicate_name": ["train/c0/c0_3.JPEG"]}


def test_too_many_rejected_images_stop_the_preparation_with_the_reasons(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in")
    bad = {f"bad{i}.JPEG": jpeg(i, 40, 32)[:-200] for i in range(5)}
    write_tar(source / "train" / "c2.tar", {**images(2, 20), **bad, "text.JPEG": b"no"})
    with pytest.raises(DataError) as caught:
        prepare(source, tmp_path / "out", max_rejected=0.01)
    message = caught.value.message
    assert "6 of 84 images are unusable (7.1%)" in message
    assert "5 x truncated, such as train/c2/bad0.JPEG (Premature end of JPEG file)" in message
    remedy = (
        f"look at the images in {tmp_path}/out/quarantine (listed in rejected.jsonl); then raise "
        "max_rejected (now 0.01), and rerun the same command"
    )
    assert remedy in message
    assert len(list((tmp_path / "out" / "quarantine" / "truncated").iterdir())) == 5
    assert prepare(source, tmp_path / "out", max_rejected=0.1)["rejected"] == 6


def test_a_refusal_leaves_the_list_and_the_files_under_their_names(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in")
    bad = {"photo one.JPEG": jpeg(1, 40, 32)[:-200], "sub/photo.png": b"no", "empty.JPEG": b""}
    write_tar(source / "train" / "c2.tar", {**images(2, 20), **bad})
    with pytest.raises(DataError):
        prepare(source, tmp_path / "out", max_rejected=0.01)
    entries = {entry["key"]: entry for entry in quarantine_list(tmp_path / "out")}
    assert {key: entry["reason"] for key, entry in entries.items()} == {
        "train/c2/photo one.JPEG": "truncated",
        "train/c2/sub/photo.png": "not_an_image",
        "train/c2/empty.JPEG": "empty",
    }
    folder = tmp_path / "out" / "quarantine"
    photo = folder / entries["train/c2/photo one.JPEG"]["file"]
    assert re.fullmatch(r"photo_one-[0-9a-f]{16}\.JPEG", photo.name)
    assert photo.read_bytes() == bad["photo one.JPEG"]
    other = folder / entries["train/c2/sub/photo.png"]["file"]
    assert re.fullmatch(r"photo-[0-9a-f]{16}\.png", other.name)


def test_a_preparation_that_stops_early_lists_what_it_has_rejected_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)  # a unit per tar
    monkeypatch.setattr(build, "MIN_IMAGES_TO_STOP_EARLY", 10)
    source = class_tars(tmp_path / "in", validation=0)
    write_tar(source / "c0.tar", {**images(0, 20), "page.JPEG": b"<html>"})
    with pytest.raises(DataError, match="1 of 21 images are unusable"):
        prepare(source, tmp_path / "out", max_rejected=0.01)
    assert keys_by_reason(tmp_path / "out") == {"not_an_image": ["c0/page.JPEG"]}


def test_a_dataset_without_a_usable_image_lists_why(tmp_path: Path) -> None:
    for name in ("c0", "c1"):
        write_tar(tmp_path / "in" / f"{name}.tar", {"page.JPEG": b"<html>"})
    with pytest.raises(DataError, match="no image is left"):
        prepare(tmp_path / "in", tmp_path / "out")
    expected = {"not_an_image": ["c0/page.JPEG", "c1/page.JPEG"]}
    assert keys_by_reason(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"min_side": 33}, "raise max_rejected (now 0) or lower min_side (now 33)"),
        ({"max_pixels": 1000}, "raise max_rejected (now 0) or raise max_pixels (now 1000)"),
    ],
    ids=["min_side", "max_pixels"],
)
def test_the_limit_that_rejects_most_images_is_named(
    settings: dict[str, int], remedy: str, tmp_path: Path
) -> None:
    source = class_tars(tmp_path / "in", validation=0)
    with pytest.raises(DataError, match=re.escape(remedy)):
        prepare(source, tmp_path / "out", max_rejected=0.0, **settings)


def test_two_rejected_files_of_the_same_name_are_both_kept(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in", validation=0)
    with tarfile.open(source / "c0.tar", "a") as tar:
        for data in (b"first", b"second"):
            info = tarfile.TarInfo("page.JPEG")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    prepare(source, tmp_path / "out")
    files = [entry["file"] for entry in quarantine_list(tmp_path / "out")]
    contents = [(tmp_path / "out" / "quarantine" / file).read_bytes() for file in files]
    assert contents == [b"first", b"second"]


@pytest.mark.parametrize(
    ("key", "start", "suffix"),
    [
        ("c0/bad0.JPEG", "bad0", ".JPEG"),
        ("c0/Müller & Söhne.png", "Müller___Söhne", ".png"),
        ("c0/.hidden.jpg", "hidden", ".jpg"),
        ("c0/--help", "help", ""),
        ("c0/..", "file", ""),
        ("c0/no ending.", "no_ending.", ""),
        ("c0/a.strange suffix", "a.strange_suffix", ""),
        ("c0/line\nbreak\x00.gif", "line_break_", ".gif"),
        ("c0/caf\\xe9.jpg", "caf_xe9", ".jpg"),
        ("c0/" + "é" * 300 + ".jpeg", "é" * 50, ".jpeg"),
        ("c0/(bytes 0 to 512)", "_bytes_0_to_512_", ""),
    ],
)
def test_a_quarantined_file_keeps_as_much_of_its_name_as_is_safe(
    key: str, start: str, suffix: str
) -> None:
    name = quarantined_name(key, b"data")
    assert re.fullmatch(rf"{re.escape(start)}-[0-9a-f]{{16}}{re.escape(suffix)}", name)
    assert len(name.encode()) < 255
    assert name != quarantined_name(f"x/{key}", b"data")
    assert name != quarantined_name(key, b"other")
