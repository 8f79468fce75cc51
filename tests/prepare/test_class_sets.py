"""The classes of the splits are compared: nothing is evaluated that was never trained."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.schema import DatasetConfig
from pipeline.data.dataset import open_dataset
from pipeline.errors import DataError
from pipeline.sources.survey import survey
from tests.prepare.people import Album, write
from tests.prepare.results import description
from tests.prepare.source_folders import prepare

CLASSES = ("cat", "cow", "dog")


@pytest.mark.parametrize(
    ("folder", "hint"),
    [("val/Cat", r"Cat \(cat\?\)"), ("val/cows", r"cows \(cow\?\)"), ("test/wolf", "wolf")],
)
def test_images_of_a_class_without_training_images_are_refused(
    folder: str, hint: str, tmp_path: Path
) -> None:
    album = Album()
    root = album.splits(tmp_path, {"train": 4, "val": 2, "test": 2}, CLASSES)
    album.fill(root / folder, 2)
    with pytest.raises(DataError, match=f"1 classes of the .* no training images: {hint}"):
        survey(DatasetConfig(root=str(root)))


def test_accents_are_the_same_class_however_a_system_writes_them(tmp_path: Path) -> None:
    album = Album()
    for name in ("caf\u00e9", "th\u00e9"):
        album.fill(tmp_path / "in" / "train" / name, 5)
    for name in ("cafe\u0301", "the\u0301"):  # as macOS writes them
        album.fill(tmp_path / "in" / "val" / name, 2)
    prepare(tmp_path / "in", tmp_path / "out")
    assert open_dataset(tmp_path / "out").classes == ["caf\u00e9", "th\u00e9"]
    assert description(tmp_path / "out")["splits"]["validation"]["images_by_class"] == [2, 2]
    album.fill(tmp_path / "in" / "train" / "cafe\u0301", 1)
    with pytest.raises(DataError, match="two names of one class"):
        survey(DatasetConfig(root=str(tmp_path / "in")))


def test_training_classes_without_validation_images_are_noted(tmp_path: Path) -> None:
    album = Album()
    root = album.splits(tmp_path, {"train": 4}, CLASSES)
    album.splits(root, {"val": 2}, CLASSES[:1])
    notes = survey(DatasetConfig(root=str(root))).notes
    assert notes == ["2 training classes have no validation images: cow, dog"]


def test_every_class_keeps_training_images_where_many_are_held_out(tmp_path: Path) -> None:
    album = Album()
    for label in range(12):
        album.fill(tmp_path / "in" / f"c{label:02d}", 1 + label % 3)
    prepare(tmp_path / "in", tmp_path / "out", validation_fraction=0.9)
    splits = description(tmp_path / "out")["splits"]
    assert min(splits["train"]["images_by_class"]) == 1
    assert splits["train"]["images"] + splits["validation"]["images"] == 24
    prepare(tmp_path / "in", tmp_path / "all", validation_fraction=1.0)
    assert list(description(tmp_path / "all")["splits"]) == ["validation"]


def tiny_imagenet(root: Path, album: Album) -> None:
    for name in CLASSES:
        album.fill(root / "train" / name / "images", 6)
        write(root / "train" / name / f"{name}_boxes.txt")
    files = sorted(album.fill(root / "val" / "images", 6).iterdir())
    lines = [f"{file.name}\t{CLASSES[i % 3]}\t0\t0\t9\t9\n" for i, file in enumerate(files)]
    write(root / "val" / "val_annotations.txt", "".join(lines).encode())
    album.fill(root / "test" / "images", 2)


def imagenet(root: Path, album: Album) -> None:
    """As unpacked from Kaggle's archive."""
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    for name in CLASSES:
        album.fill(images / "train" / name, 6)
    files = sorted(album.fill(images / "val", 6).iterdir())
    rows = [f"{file.stem},{CLASSES[i % 3]} 1 2 3 4\n" for i, file in enumerate(files)]
    write(root / "LOC_val_solution.csv", ("ImageId,PredictionString\n" + "".join(rows)).encode())


def synset_labels(root: Path, album: Album) -> None:
    for name in CLASSES:
        album.fill(root / "train" / name, 6)
    album.fill(root / "val", 6)
    text = "".join(f"{CLASSES[i % 3]}\n" for i in range(6))
    write(root / "imagenet_2012_validation_synset_labels.txt", text.encode())


@pytest.mark.parametrize("make", [tiny_imagenet, imagenet, synset_labels])
def test_a_flat_validation_folder_is_read_with_its_file_of_labels(
    make: Callable[[Path, Album], None], tmp_path: Path
) -> None:
    make(tmp_path / "in", Album())
    root = tmp_path / "in"
    root = root / "ILSVRC/Data/CLS-LOC" if make is imagenet else root
    prepare(root, tmp_path / "out")
    values = description(tmp_path / "out")
    assert values["splits"]["train"]["images_by_class"] == [6, 6, 6]
    assert values["splits"]["validation"]["images_by_class"] == [2, 2, 2]
    assert values["rejected"] == {}
    validation = open_dataset(tmp_path / "out").split("validation")
    folder = root / "val" / "images" if make is tiny_imagenet else root / "val"
    expected = {path.read_bytes(): i % 3 for i, path in enumerate(sorted(folder.glob("*.jpg")))}
    assert {
        bytes(validation.image(i)): validation.label(i) for i in range(len(validation))
    } == expected


def test_flat_images_without_a_label_are_refused_before_train_is_read(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path, Album())
    (tmp_path / "val" / "val_annotations.txt").write_text("other.jpg\tcat\t0\n")
    with pytest.raises(DataError, match="6 of 6 validation images have no label"):
        survey(DatasetConfig(root=str(tmp_path)))
    os.remove(tmp_path / "val" / "val_annotations.txt")
    with pytest.raises(DataError, match=r"val has no class in common .* only images"):
        survey(DatasetConfig(root=str(tmp_path)))
