"""What becomes a split, and where the user has to decide."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.schema import DatasetConfig
from pipeline.data.dataset import open_dataset
from pipeline.errors import DataError
from pipeline.sources.inspection import inspect_source
from pipeline.sources.survey import survey
from tests.prepare.people import Album
from tests.prepare.results import description
from tests.prepare.source_folders import prepare, write_tar

CLASSES = ("daisy", "rose", "tulip")


def counts(target: Path) -> dict[str, list[int]]:
    splits = description(target)["splits"]
    return {name: split["images_by_class"] for name, split in splits.items()}


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("Train_Data", "Eval_Data", "Test_Data"),
        ("TRAIN", "hold-out", "TESTING"),
        ("flowers_train", "flowers_dev", "flowers_test"),
    ],
)
def test_look_and_preparation_agree_about_the_splits(
    train: str, validation: str, test: str, tmp_path: Path
) -> None:
    sizes = {train: 9, validation: 4, test: 3}
    root = Album().splits(tmp_path / "in", sizes, CLASSES)
    inspected = inspect_source(DatasetConfig(root=str(root)))
    assert (inspected.images, inspected.classes, inspected.has_validation) == (27, 3, True)
    prepare(root, tmp_path / "out")
    assert counts(tmp_path / "out") == {"train": [9] * 3, "validation": [4] * 3, "test": [3] * 3}
    assert open_dataset(tmp_path / "out").classes == list(CLASSES)


def test_folders_that_are_no_split_are_named(tmp_path: Path) -> None:
    album = Album()
    root = album.splits(tmp_path / "in", {"train": 5, "val": 2}, CLASSES)
    album.fill(root / "unsorted", 2)
    notes: list[str] = []
    prepare(root, tmp_path / "out", notes=notes)
    assert notes == ["set: not used, as they are none of the splits: unsorted"]
    assert counts(tmp_path / "out") == {"train": [5] * 3, "validation": [2] * 3}


@pytest.mark.parametrize(
    "folders",
    [
        ["train/1", "car/1", "bus/1"],  # vehicles
        ["train/steam/1", "train/ice/1", "car/suv/1", "car/van/1"],
        ["rose/1", "tulip/1", "test/1"],  # images without labels, or a class
        ["rose/1", "eval/1"],
        ["lab_a/rose/1", "lab_a/tulip/1", "lab_b/rose/1", "lab_b/tulip/1"],
        ["2019/a/1", "2019/b/1", "2020/a/1", "2020/b/1", "2021/a/1", "2021/c/1", "2021/b/1"],
    ],
)
def test_where_folders_may_be_splits_or_classes_the_user_is_asked(
    folders: list[str], tmp_path: Path
) -> None:
    album = Album()
    for folder in folders:
        album.fill((tmp_path / folder).parent, 3)
    with pytest.raises(DataError, match=r"unclear which of its folders are splits .*\n.*splits"):
        survey(DatasetConfig(root=str(tmp_path)))
    tops = {folder.partition("/")[0] for folder in folders}
    whole = survey(DatasetConfig(root=str(tmp_path), splits="none"))
    assert {class_id for class_id, _ in whole.classes} == tops


@pytest.mark.parametrize(
    "folders",
    [
        ["rose/images", "tulip/images"],  # as in Tiny ImageNet
        ["rose/2019", "tulip/2020"],
        ["rose/red", "rose/white", "tulip/yellow", "tulip/black"],
    ],
)
def test_folders_inside_of_classes_are_no_reason_to_ask(folders: list[str], tmp_path: Path) -> None:
    album = Album()
    for folder in folders:
        album.fill(tmp_path / folder, 3)
    classes = survey(DatasetConfig(root=str(tmp_path))).classes
    assert [class_id for class_id, _ in classes] == ["rose", "tulip"]


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "Test"), ("train_set", "dev")])
def test_archives_of_whole_splits_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    album = Album()
    for name in names:
        files = {f"{name}/{label}/{i}.jpg": album.image() for label in CLASSES for i in range(2)}
        write_tar(tmp_path / f"{name}.tar", files)
    with pytest.raises(DataError, match=r"(archives of whole splits|folders of several classes)"):
        survey(DatasetConfig(root=str(tmp_path)))
