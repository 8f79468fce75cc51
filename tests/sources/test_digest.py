"""A changed source is noticed, whatever its split folders are called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.config.schema import DatasetConfig, Job
from pipeline.layout import RunDir
from pipeline.orchestrate import artifacts
from pipeline.sources.digest import source_digest
from pipeline.sources.inspection import inspect_source
from pipeline.sources.split_names import TEST_NAMES, TRAIN_NAMES, VALIDATION_NAMES
from pipeline.sources.survey import survey
from tests.data.small_datasets import jpeg
from tests.prepare.source_folders import class_folders, class_tars, images, write_tar

SPLIT_NAMES = (*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES)
SPLITS = [(train, validation) for train in TRAIN_NAMES for validation in VALIDATION_NAMES]


def digest_of(root: Path) -> str | None:
    return source_digest(DatasetConfig(root=str(root)))


@pytest.mark.parametrize("split", SPLIT_NAMES)
def test_an_image_added_to_a_class_of_a_split_changes_the_digest(
    split: str, tmp_path: Path
) -> None:
    class_folders(tmp_path / split)
    before = digest_of(tmp_path)
    assert digest_of(tmp_path) == before
    (tmp_path / split / "c0" / "new.JPEG").write_bytes(jpeg(77, 40, 32))
    assert digest_of(tmp_path) != before


@pytest.mark.parametrize("split", SPLIT_NAMES)
def test_a_tar_of_a_split_that_is_written_in_place_changes_the_digest(
    split: str, tmp_path: Path
) -> None:
    class_tars(tmp_path / split, validation=0)
    before = digest_of(tmp_path)
    write_tar(tmp_path / split / "c0.tar", images(0, 21))
    assert digest_of(tmp_path) != before


def test_a_missing_root_has_no_digest(tmp_path: Path) -> None:
    assert digest_of(tmp_path / "missing") is None


def test_preparation_is_not_skipped_after_a_change_below_training(tmp_path: Path) -> None:
    """The inputs that the ledger compares before it skips a finished stage."""
    source = tmp_path / "images"
    class_folders(source / "training")
    job = Job.model_validate(
        {
            "name": "small",
            "model": {"channels": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "columns": 4},
            "data": {"images": {"root": str(source)}},
            "stages": {"prepare": {}},
        }
    )
    run = RunDir(tmp_path / "run")
    before = artifacts.inputs(job, "prepare", run)
    assert artifacts.inputs(job, "prepare", run) == before
    (source / "training" / "c0" / "new.JPEG").write_bytes(jpeg(77, 40, 32))
    assert artifacts.inputs(job, "prepare", run) != before


@pytest.mark.parametrize(("train", "validation"), SPLITS)
def test_survey_and_inspection_know_the_same_split_folders(
    train: str, validation: str, tmp_path: Path
) -> None:
    class_folders(tmp_path / train, count=5)
    class_folders(tmp_path / validation, count=2)
    os.makedirs(tmp_path / train / "__MACOSX")
    surveyed = survey(DatasetConfig(root=str(tmp_path)))
    assert {unit.split for unit in surveyed.units} == {"train", "validation"}
    assert [class_id for class_id, _ in surveyed.classes] == ["c0", "c1", "c2"]
    inspected = inspect_source(DatasetConfig(root=str(tmp_path)))
    assert inspected.has_validation
    assert (inspected.classes, inspected.images) == (3, 15)


def test_a_file_that_is_written_in_place_with_as_many_bytes_changes_the_digest(
    tmp_path: Path,
) -> None:
    class_folders(tmp_path)
    image = tmp_path / "c0" / "c0_0.JPEG"
    before = digest_of(tmp_path)
    times = image.stat()
    image.write_bytes(image.read_bytes()[::-1])
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert digest_of(tmp_path) != before


def test_the_digest_follows_links_and_ends_at_loops(tmp_path: Path) -> None:
    class_folders(tmp_path / "store")
    class_folders(tmp_path / "set")
    os.symlink(tmp_path / "store" / "c0", tmp_path / "set" / "c9")
    os.symlink("..", tmp_path / "set" / "c1" / "up")
    before = digest_of(tmp_path / "set")
    (tmp_path / "store" / "c0" / "new.JPEG").write_bytes(jpeg(77, 40, 32))
    assert digest_of(tmp_path / "set") != before
