"""Splits that a source does not have are refused before anything starts, with the place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.jobs import edited, error_message, load_and_check, write
from tests.data.small_datasets import jpeg

DATASET = 'toy: {root: "/images", layout: class_tars}'


def _job(folder: Path, splits: str, dataset: str = "") -> str:
    """The small job with a real source: a/learn/ and b/, two classes in each."""
    for split in ("a/learn", "b"):
        for label in range(2):
            path = folder / "images" / split / f"c{label}" / "0.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(label, 40, 32))
    keys = f'{{root: "{folder}/images", splits: {splits}{dataset}}}'
    return edited(DATASET, f"toy: {keys}")


@pytest.mark.parametrize(
    "splits",
    [
        "{train: a/learn, validation: b}",
        "{train: a/learn, test: b/}",
        "none",
    ],
)
def test_splits_that_the_source_has_are_accepted(splits: str, tmp_path: Path) -> None:
    load_and_check(write(tmp_path, _job(tmp_path, splits)))


@pytest.mark.parametrize(
    ("splits", "key", "cause", "remedy"),
    [
        ("{train: a/lern}", ".train", "has no folder a/lern", "did you mean 'a/learn'?"),
        ("{train: a/learn, test: c}", ".test", "has no folder c", "folders of the source: a, b"),
        ("{train: ../b}", ".train", "../b is outside of the source", "a folder below"),
        ("{train: a, test: a/learn}", ".test", "test (a/learn) and train (a) have images", "name"),
        ("{train: ., test: b}", ".test", "test (b) and train (.) have images in common", "name"),
        ("{test: b}", "", "names no training images, and the stage pretrain trains", "add train"),
        ("{}", "", "names no split", "name train, validation or test"),
    ],
)
def test_impossible_splits_are_refused_with_the_line_and_the_key(
    splits: str, key: str, cause: str, remedy: str, tmp_path: Path
) -> None:
    text = error_message(tmp_path, _job(tmp_path, splits))
    assert f"job.yaml:5: data.toy.splits{key}: " in text
    assert cause in text
    assert f"\n  -> {remedy}" in text


def test_other_values_of_splits_are_refused_by_the_schema(tmp_path: Path) -> None:
    text = error_message(tmp_path, _job(tmp_path, "nothing"))
    assert "job.yaml:5: data.toy.splits: expected" in text
    text = error_message(tmp_path, _job(tmp_path, "{tain: a/learn}"))
    assert text == "job.yaml:5: unknown key 'tain' in data.toy.splits\n  -> did you mean 'train'?"


def test_a_split_that_a_hugging_face_dataset_lacks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "dataset_dict.json").write_text('{"splits": ["fold0", "fold1"]}')
    text = error_message(tmp_path, _job(tmp_path, "{train: fold0, validation: fold9}"))
    assert "job.yaml:5: data.toy.splits.validation: the dataset has no split fold9" in text
    assert "did you mean 'fold1'?" in text or "did you mean 'fold0'?" in text


def test_a_dataset_that_is_all_validation_cannot_be_trained_on(tmp_path: Path) -> None:
    text = error_message(
        tmp_path, edited(DATASET, DATASET.replace("}", ", validation_fraction: 1.0}"))
    )
    assert "job.yaml:5: data.toy.validation_fraction: 1 holds out every image" in text
