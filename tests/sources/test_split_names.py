"""Folders with the usual names of splits are recognised, however they are written."""

from __future__ import annotations

import pytest

from pipeline.sources.split_names import split_like, usual_splits


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("TRAINING", "VALIDATION", "validation"),
        ("train2017", "val2017", "validation"),
        ("TrainSet", "DevSet", "validation"),
        ("train-images", "held-out images", "validation"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val", "validation"),
        ("training_data", "evaluation_data", "validation"),
        ("raw_train", "raw_test", "test"),
        ("birds train", "birds test", "test"),
        ("train.tar", "test.tar", "test"),
    ],
)
def test_names_of_splits_are_recognised(train: str, other: str, split: str) -> None:
    assert usual_splits([other, train]) == {"train": train, split: other}


@pytest.mark.parametrize(
    "names",
    [
        ["bullet_train", "steam_engine"],
        ["test_tube", "beaker"],
        ["crash_test", "valley"],
        ["trainer", "devil", "evaluator"],
        ["trainval", "cat"],
        ["model train", "model car"],
    ],
)
def test_names_that_mean_something_else_are_no_splits(names: list[str]) -> None:
    assert usual_splits(names) == {}


def test_the_plain_name_wins_over_a_longer_one() -> None:
    present = ["train_small", "train", "valid", "val", "imagenet21k_small_classes"]
    assert usual_splits(present) == {"train": "train", "validation": "val"}


def test_a_name_with_two_splits_is_none() -> None:
    assert split_like("train_val") is None
    assert split_like("test-train") is None
