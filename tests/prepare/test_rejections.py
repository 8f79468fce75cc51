"""Unusable and repeated images are left out, counted and listed (faults D1, D2 and D4)."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from pipeline.config.schema import DatasetConfig, SyntheticConfig
from pipeline.errors import DataError
from pipeline.prepare.verify import verify_dataset
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
        "not_an_image": 4,  # two web pages, two files of operating systems
        "too_small": 2,
        "truncated": 2,
    }
    assert values["duplicates"] == {"duplicate": 2, "in_validation": 2}
    assert values["changed"] == {"converted": 6, "unpacked": 2}
    # 24 images and 24 corrupt files, less 10 rejected and 4 duplicates.
    assert (metrics["images"], metrics["validation"]) == (24 + 24 - 10 - 4, 12)
    entries = quarantine_list(tmp_path / "out")
    assert len(entries) == 14
    assert all(entry["reason"] for entry in entries)
    assert all(entry["key"] for entry in entries)
    kept = [tmp_path / "out" / "quarantine" / entry["file"] for entry in entries if entry["file"]]
    assert len(kept) == 8
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
    assert "max_rejected (now 0.01)" in message
    assert len(list((tmp_path / "out" / "quarantine" / "truncated").iterdir())) == 5
    assert prepare(source, tmp_path / "out", max_rejected=0.1)["rejected"] == 6
