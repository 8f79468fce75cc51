"""Sources and datasets that cannot be used are refused with a remedy (faults D5 and D9)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from pipeline.config.schema import DatasetConfig
from pipeline.data.dataset import open_dataset
from pipeline.errors import CheckpointError, DataError
from pipeline.evaluate.network import require_same_classes
from pipeline.files import write_json
from pipeline.layout import RunDir
from pipeline.prepare.build import prepare_dataset
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.rank_link import RankLink
from pipeline.train.trainer import train_stage
from tests.prepare.source_folders import (
    class_folders,
    images,
    prepare,
    serial,
    write_tar,
)
from tests.train import staging


def missing(root: Path) -> Path:
    return root / "missing"


def empty_folder(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"


def one_class(root: Path) -> Path:
    return class_folders(root / "one", classes=1)


def only_empty_files(root: Path) -> Path:
    write_tar(root / "none" / "a.tar", {"x.JPEG": b""})
    write_tar(root / "none" / "b.tar", {"x.JPEG": b""})
    return root / "none"


@pytest.mark.parametrize(
    ("make_source", "message"),
    [
        (missing, "there is no such folder"),
        (empty_folder, "no images in a layout"),
        (one_class, "1 class: nothing to tell apart"),
        (only_empty_files, "no image is left for the train split"),
    ],
)
def test_an_unusable_source_is_refused_with_its_cause(
    make_source: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(make_source(tmp_path), tmp_path / "out")


def test_classes_that_the_class_list_lacks_are_named(tmp_path: Path) -> None:
    message = "3 classes of the source are not in the class list imagenet1k: c0, c1, c2"
    with pytest.raises(DataError, match=message):
        prepare(class_folders(tmp_path / "in"), tmp_path / "out", classes="imagenet1k")


def test_a_class_without_images_is_a_warning(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in")
    (source / "c9").mkdir()
    messages: list[tuple[str, str]] = []
    prepare_dataset(
        name="set",
        config=DatasetConfig(root=str(source), min_side=16),
        target=tmp_path / "out",
        seed=0,
        tasks=serial,
        progress=lambda *_: None,
        log=lambda text, level="info": messages.append((level, text)),
    )
    assert messages == [("warning", "set: 1 classes have no image: c9")]
    assert open_dataset(tmp_path / "out").classes == ["c0", "c1", "c2", "c9"]


@pytest.mark.parametrize("layout", ["tars", "folders"])
def test_zero_images_and_one_class_are_refused_with_a_remedy(layout: str, tmp_path: Path) -> None:
    if layout == "tars":
        for name in "ab":
            write_tar(tmp_path / "zero" / f"{name}.tar", {})
        write_tar(tmp_path / "one" / "a.tar", images(0, 5))
    else:
        for name in "ab":
            (tmp_path / "zero" / name).mkdir(parents=True)
        class_folders(tmp_path / "one", classes=1)
    for source, message in (
        ("zero", r"zero: no image is left for the train split\n  -> add images"),
        ("one", r"one: has 1 class: nothing to tell apart\n  -> provide at least two classes"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(tmp_path / source, tmp_path / "out")
        assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_dataset_smaller_than_one_batch_is_refused_before_training(tmp_path: Path) -> None:
    run_dir = staging.prepared(tmp_path, train=15)
    message = r"15 training images are fewer than one global batch of 16\n  -> lower global_batch"
    # The stage makes this process a rank, by its environment.
    with mock.patch.dict(os.environ), pytest.raises(DataError, match=message):
        train_stage(
            staging.job(), "pretrain", RunDir(run_dir), DistEnv.from_environment(), RankLink()
        )


def test_an_export_with_classes_in_another_order_than_those_of_the_model_is_refused(
    tmp_path: Path,
) -> None:
    run_dir = staging.prepared(tmp_path)
    staging.with_weights(run_dir)
    data = open_dataset(run_dir / "stages" / "prepare" / "set")
    weights = run_dir / "stages" / "finetune" / "weights.json"
    write_json(weights, {"image_size": 64, "classes": data.classes})
    require_same_classes(RunDir(run_dir), "finetune", data)
    write_json(weights, {"image_size": 64, "classes": data.classes[::-1]})
    message = (
        r"weights\.safetensors: weights were trained on 6 classes that are not the 6 of set\n"
        r"  -> take the dataset"
    )
    with pytest.raises(CheckpointError, match=message):
        require_same_classes(RunDir(run_dir), "finetune", data)
