"""A source is divided as the job says, or by the usual names of its folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from pipeline.config.schema import DatasetConfig
from pipeline.data.dataset import open_dataset
from pipeline.data.description import DatasetDescription
from pipeline.errors import DataError
from pipeline.sources.digest import source_digest
from pipeline.sources.inspection import inspect_source
from pipeline.sources.survey import survey
from tests.data.small_datasets import jpeg
from tests.prepare.results import contents
from tests.prepare.source_folders import Files, images, prepare, write_tar

WriteClass = Callable[[Path, str, Files], None]  # (folder of the classes, class, images)


def as_folder(parent: Path, name: str, files: Files) -> None:
    (parent / name).mkdir(parents=True)
    for file, data in files.items():
        (parent / name / file).write_bytes(data)


def as_tar(parent: Path, name: str, files: Files) -> None:
    write_tar(parent / f"{name}.tar", files)


both_layouts = pytest.mark.parametrize("write_class", [as_folder, as_tar])


def write_splits(root: Path, write_class: WriteClass, *folders: str) -> Path:
    """Three classes in each folder, with other images in each: 12 in the first, 4 in the others."""
    for number, folder in enumerate(folders):
        for label in range(3):
            count = 4 if number else 12
            files = images(label, count, first=100 * number)
            write_class(root / folder, f"c{label}", files)
    return root


def of_folder(number: int) -> dict[bytes, int]:
    """The images that ``write_splits`` put into its folder with this number."""
    count = 4 if number else 12
    return {
        data: label
        for label in range(3)
        for data in images(label, count, first=100 * number).values()
    }


def split_names(target: Path) -> list[str]:
    return list(DatasetDescription.read(target).splits)


@both_layouts
def test_named_folders_become_the_splits(write_class: WriteClass, tmp_path: Path) -> None:
    write_splits(tmp_path / "in", write_class, "photos/learn", "photos/check", "exam")
    notes: list[str] = []
    chosen = {"train": "photos/learn", "validation": "photos/check", "test": "exam"}
    prepare(tmp_path / "in", tmp_path / "out", splits=chosen, notes=notes)
    assert notes == []
    assert split_names(tmp_path / "out") == ["train", "validation", "test"]
    for number, split in enumerate(("train", "validation", "test")):
        assert contents(tmp_path / "out", split) == of_folder(number)


@both_layouts
def test_train_and_test_alone_are_train_and_validation_and_the_output_says_so(
    write_class: WriteClass, tmp_path: Path
) -> None:
    write_splits(tmp_path / "in", write_class, "train", "test")
    notes: list[str] = []
    prepare(tmp_path / "in", tmp_path / "out", notes=notes)
    assert contents(tmp_path / "out", "validation") == of_folder(1)
    assert split_names(tmp_path / "out") == ["train", "validation"]
    assert notes == [
        "set: the validation split is test, as there is no other; "
        "for a test split of its own, set `splits`"
    ]


@both_layouts
def test_a_test_folder_beside_validation_is_prepared_and_reported(
    write_class: WriteClass, tmp_path: Path
) -> None:
    write_splits(tmp_path / "in", write_class, "train", "val", "test")
    notes: list[str] = []
    prepare(tmp_path / "in", tmp_path / "out", selection_fraction=0.5, notes=notes)
    assert contents(tmp_path / "out", "test") == of_folder(2)
    assert contents(tmp_path / "out", "train") == of_folder(0)
    description = DatasetDescription.read(tmp_path / "out")
    assert description.reported_split() == "test"
    assert description.selection_split() == "validation"
    assert notes == [
        "set: selection_fraction is not used: the source has a test split, so the validation "
        "split chooses the best checkpoint"
    ]


@pytest.mark.parametrize("inside", ["images/1.JPEG", "1.JPEG"])
@pytest.mark.parametrize("folders", [["train", "val"], ["train"]])
def test_a_test_folder_without_labels_is_listed_as_unused(
    inside: str, folders: list[str], tmp_path: Path
) -> None:
    write_splits(tmp_path / "in", as_folder, *folders)
    path = tmp_path / "in" / "test" / inside
    path.parent.mkdir(parents=True)
    path.write_bytes(jpeg(1, 40, 32))
    notes: list[str] = []
    prepare(tmp_path / "in", tmp_path / "out", notes=notes, validation_fraction=0.3)
    assert notes == ["set: test is not used: its images have no labels (none of the other classes)"]
    assert split_names(tmp_path / "out") == ["train", "validation"]
    assert open_dataset(tmp_path / "out").classes == ["c0", "c1", "c2"]
    held_out = contents(tmp_path / "out", "validation")
    if folders == ["train"]:
        assert held_out.items() <= of_folder(0).items()
    else:
        assert held_out == of_folder(1)
    with pytest.raises(DataError, match="test has no class in common with the training images"):
        prepare(tmp_path / "in", tmp_path / "named", splits={"train": "train", "test": "test"})


def test_no_image_of_the_test_split_is_trained_on(tmp_path: Path) -> None:
    write_splits(tmp_path / "in", as_folder, "train", "val", "test")
    leaked = images(0, 4, first=200)["c0_1.JPEG"]
    for split in ("train", "val"):
        (tmp_path / "in" / split / "c1" / "leak.JPEG").write_bytes(leaked)
    prepare(tmp_path / "in", tmp_path / "out")
    assert DatasetDescription.read(tmp_path / "out").duplicates == {"in_test": 2}
    assert leaked in contents(tmp_path / "out", "test")


def test_folders_called_like_splits_can_be_classes(tmp_path: Path) -> None:
    for label, name in enumerate(("test", "train", "tram")):  # vehicles and a coin-operated thing
        as_folder(tmp_path / "in", name, images(label, 10))
    prepare(tmp_path / "in", tmp_path / "out", splits="none")
    assert open_dataset(tmp_path / "out").classes == ["test", "train", "tram"]
    assert sum(len(contents(tmp_path / "out", split)) for split in ("train", "validation")) == 30


@both_layouts
@pytest.mark.parametrize("folders", [["val"], ["test"], ["val", "test"]])
def test_a_source_without_training_images_is_prepared_for_evaluation(
    folders: list[str], write_class: WriteClass, tmp_path: Path
) -> None:
    write_splits(tmp_path / "in", write_class, *folders)
    prepare(tmp_path / "in", tmp_path / "out")
    names = ["validation" if folder == "val" else folder for folder in folders]
    assert split_names(tmp_path / "out") == names
    assert contents(tmp_path / "out", names[-1]) == of_folder(len(folders) - 1)


def test_all_images_can_be_for_evaluation(tmp_path: Path) -> None:
    write_splits(tmp_path / "in", as_folder, ".")
    prepare(tmp_path / "in", tmp_path / "out", validation_fraction=1.0)
    assert split_names(tmp_path / "out") == ["validation"]
    assert contents(tmp_path / "out", "validation") == of_folder(0)
    prepare(tmp_path / "in", tmp_path / "root", splits={"test": "."})
    assert contents(tmp_path / "root", "test") == of_folder(0)


def test_a_validation_folder_of_other_classes_is_refused(tmp_path: Path) -> None:
    write_splits(tmp_path / "in", as_folder, "train")
    as_folder(tmp_path / "in" / "val", "images", images(0, 3, first=500))
    with pytest.raises(
        DataError,
        match="val has no class in common with the training images: it has only images",
    ):
        survey(DatasetConfig(root=str(tmp_path / "in")))


def test_a_change_in_a_named_folder_is_noticed_and_inspected(tmp_path: Path) -> None:
    write_splits(tmp_path, as_folder, "a/learn", "b")
    config = DatasetConfig.model_validate(
        {"root": str(tmp_path), "splits": {"train": "a/learn", "validation": "b"}}
    )
    before = source_digest(config)
    (tmp_path / "a" / "learn" / "c0" / "new.JPEG").write_bytes(jpeg(77, 40, 32))
    assert source_digest(config) != before
    inspected = inspect_source(config)
    assert (inspected.images, inspected.classes, inspected.has_validation) == (37, 3, True)


def _save(folder: Path, splits: dict[str, int], hidden: str = "") -> None:
    """Save a dataset of three classes; the labels of the split ``hidden`` are -1."""
    kind = datasets.ClassLabel(names=["ape", "bee", "cat"])
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    saved = datasets.DatasetDict()
    for number, (name, count) in enumerate(splits.items()):
        rows = range(count)
        columns = {
            "image": [{"bytes": jpeg(100 * number + i, 40, 32), "path": None} for i in rows],
            "label": [-1 if name == hidden else i % 3 for i in rows],
        }
        saved[name] = datasets.Dataset.from_dict(columns, features=features)
    saved.save_to_disk(str(folder))


def test_splits_of_a_hugging_face_dataset_are_chosen_by_name(tmp_path: Path) -> None:
    _save(tmp_path / "in", {"fold0": 20, "fold1": 10, "fold2": 5})
    chosen = {"train": "fold1", "validation": "fold2", "test": "fold0"}
    prepare(tmp_path / "in", tmp_path / "out", splits=chosen)
    splits = DatasetDescription.read(tmp_path / "out").splits
    counts = {name: split.images for name, split in splits.items()}
    assert counts == {"train": 10, "validation": 5, "test": 20}
    with pytest.raises(DataError, match=r"there is no split fold3.*\n.*did you mean 'fold"):
        prepare(tmp_path / "in", tmp_path / "other", splits={"train": "fold3"})
    with pytest.raises(DataError, match="this dataset has splits by name"):
        prepare(tmp_path / "in", tmp_path / "other", splits="none")


@pytest.mark.parametrize("hidden", ["", "test"])
def test_the_test_split_of_a_hugging_face_dataset_is_used_if_it_has_labels(
    hidden: str, tmp_path: Path
) -> None:
    _save(tmp_path / "in", {"train": 20, "validation": 6, "test": 7}, hidden)
    notes: list[str] = []
    prepare(tmp_path / "in", tmp_path / "out", notes=notes)
    names = split_names(tmp_path / "out")
    if hidden:
        assert notes == ["set: the split test is not used: its images have no labels"]
        assert names == ["train", "validation"]
    else:
        assert notes == []
        assert names == ["train", "validation", "test"]
        assert len(contents(tmp_path / "out", "test")) == 7
