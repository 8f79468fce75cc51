"""A part of the training images chooses the checkpoint, apart from those of the final figure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.schema import DatasetConfig
from pipeline.data.description import DatasetDescription
from pipeline.prepare.fingerprint import fingerprint
from pipeline.prepare.verify import verify_dataset
from pipeline.sources.survey import survey
from tests.prepare.results import contents
from tests.prepare.source_folders import (
    backwards,
    class_folders,
    class_tars,
    images,
    prepare,
    serial,
    shard_bytes,
    tar_bytes,
    write_tar,
)

# Of a small source with the default settings, computed before there was a selection split.
FINGERPRINT_OF_EARLIER_VERSIONS = "290f6e7206a74bf924696ce718c03dda"


@pytest.mark.parametrize("make_source", [class_folders, class_tars])
def test_selection_images_are_apart_from_training_and_validation(
    make_source: Callable[..., Path], tmp_path: Path
) -> None:
    make_source(tmp_path / "in", count=100)
    metrics = prepare(tmp_path / "in", tmp_path / "out", selection_fraction=0.2)
    names = list(DatasetDescription.read(tmp_path / "out").splits)
    assert names == ["train", "selection", "validation"]
    splits = {name: contents(tmp_path / "out", name) for name in names}
    assert metrics["selection"] == len(splits["selection"])
    assert 30 <= len(splits["selection"]) <= 90
    # No image is in two splits, and the held-out ones are training images of the source.
    assert len({data for split in splits.values() for data in split}) == sum(
        len(split) for split in splits.values()
    )
    source = {data: label for label in range(3) for data in images(label, 100).values()}
    assert splits["selection"].items() <= source.items()
    assert verify_dataset(tmp_path / "out", serial, lambda *_: None) == []
    # The same images again, read by other workers in another order.
    prepare(tmp_path / "in", tmp_path / "again", tasks=backwards, selection_fraction=0.2)
    assert shard_bytes(tmp_path / "again") == shard_bytes(tmp_path / "out")


def test_a_larger_selection_split_holds_the_smaller_one(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", count=100)
    splits = []
    for fraction in (0.0, 0.1, 0.3):
        target = tmp_path / str(fraction)
        prepare(tmp_path / "in", target, selection_fraction=fraction)
        has_selection = "selection" in DatasetDescription.read(target).splits
        assert has_selection == (fraction > 0)
        splits.append(contents(target, "selection").keys() if has_selection else set())
        # What is reported does not depend on what selects.
        assert contents(target, "validation") == contents(tmp_path / "0.0", "validation")
    assert splits[0] < splits[1] < splits[2]


def test_every_class_keeps_a_training_image(tmp_path: Path) -> None:
    class_tars(tmp_path / "in", classes=3, count=4)
    prepare(tmp_path / "in", tmp_path / "out", selection_fraction=0.999)
    train = DatasetDescription.read(tmp_path / "out").splits["train"]
    assert train.images_by_class == [1, 1, 1]


def test_a_picture_in_two_classes_never_trains_and_selects(tmp_path: Path) -> None:
    both = images(9, 1)["c9_0.JPEG"]
    for label in range(2):
        write_tar(tmp_path / "in" / "train" / f"c{label}.tar", {"both.JPEG": both})
        write_tar(tmp_path / "in" / "val" / f"c{label}.tar", images(label, 2, first=500))
    write_tar(tmp_path / "in" / "train" / "c1.tar", {"both.JPEG": both, **images(1, 20, first=100)})
    prepare(tmp_path / "in", tmp_path / "out", selection_fraction=0.999)
    # The first class has this picture only, so it must train, and for the second class as well.
    description = DatasetDescription.read(tmp_path / "out")
    assert description.splits["train"].images_by_class[0] == 1
    assert both not in contents(tmp_path / "out", "selection")


def test_few_images_without_a_selection_split_are_reported(tmp_path: Path) -> None:
    notes: list[str] = []
    class_folders(tmp_path / "in", classes=2, count=3)
    prepare(
        tmp_path / "in",
        tmp_path / "out",
        validation_fraction=0.5,
        selection_fraction=1e-9,
        notes=notes,
    )
    assert "set: too few images for a selection split of 1e-09: none is held out" in notes
    assert DatasetDescription.read(tmp_path / "out").selection_split() is None


def test_without_the_key_prepared_datasets_stay_up_to_date(tmp_path: Path) -> None:
    # The fingerprint depends on names and sizes; the content of these files does not matter.
    for split, label in (("train", 0), ("train", 1), ("val", 0), ("val", 1)):
        data = tar_bytes({f"{number}.JPEG": b"x" * 100 for number in range(3)})
        path = tmp_path / split / f"c{label}.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    def fingerprint_with(**settings: float) -> str:
        config = DatasetConfig(root=str(tmp_path), **settings)  # type: ignore[arg-type]
        return fingerprint(survey(config), config, seed=0)

    assert fingerprint_with() == FINGERPRINT_OF_EARLIER_VERSIONS
    assert fingerprint_with(selection_fraction=0.1) != FINGERPRINT_OF_EARLIER_VERSIONS
