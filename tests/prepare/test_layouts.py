"""Sources in every layout become datasets with the right images, labels and splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import DatasetConfig
from pipeline.data.dataset import open_dataset
from pipeline.errors import DataError
from pipeline.prepare.verify import verify_dataset
from pipeline.sources import survey, units
from pipeline.sources.layouts import class_tars as class_tars_layout
from tests.data.small_datasets import jpeg
from tests.prepare.results import contents
from tests.prepare.source_folders import (
    class_folders,
    class_tars,
    images,
    prepare,
    serial,
    tar_bytes,
    write_tar,
)


def test_class_tars_keep_their_validation_split(tmp_path: Path) -> None:
    metrics = prepare(class_tars(tmp_path / "in"), tmp_path / "out", shard_rows=25)
    assert (metrics["images"], metrics["validation"]) == (60, 18)
    assert (metrics["classes"], metrics["rejected"]) == (3, 0)
    expected = {data: label for label in range(3) for data in images(label, 20).values()}
    assert contents(tmp_path / "out", "train") == expected
    assert open_dataset(tmp_path / "out").classes == ["c0", "c1", "c2"]
    assert not (tmp_path / "out" / "work").exists()
    assert verify_dataset(tmp_path / "out", serial, lambda *_: None) == []


def test_every_shard_contains_all_classes(tmp_path: Path) -> None:
    prepare(class_tars(tmp_path / "in", classes=4, count=100), tmp_path / "out", shard_rows=100)
    for shard in sorted((tmp_path / "out").glob("train-*.parquet")):
        labels = pq.read_table(shard, columns=["label"])["label"].to_numpy()
        assert (np.bincount(labels, minlength=4) > 10).all()


def test_class_folders_without_a_validation_split_are_split_by_content(tmp_path: Path) -> None:
    metrics = prepare(
        class_folders(tmp_path / "in", count=100), tmp_path / "out", validation_fraction=0.2
    )
    assert metrics["images"] + metrics["validation"] == 300
    assert 35 <= metrics["validation"] <= 85
    train = contents(tmp_path / "out", "train")
    assert not train.keys() & contents(tmp_path / "out", "validation").keys()


def test_imagenet_is_read_from_the_archives_as_published(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_tar(
        source / "ILSVRC2012_img_train.tar",
        {f"n{i:08d}.tar": tar_bytes(images(i, 12)) for i in range(3)},
    )
    validation = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(9000 + i, 40, 32) for i in range(1, 8)}
    labels = [f"n{i % 3:08d}" for i in range(1, 8)]
    write_tar(source / "ILSVRC2012_img_val.tar", dict(reversed(validation.items())))
    with pytest.raises(DataError, match="labels of the validation images are missing"):
        prepare(source, tmp_path / "out")
    (source / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(labels) + "\n")
    metrics = prepare(source, tmp_path / "out")
    assert (metrics["images"], metrics["validation"]) == (36, 7)
    expected = {data: i % 3 for i, data in enumerate(validation.values(), 1)}
    assert contents(tmp_path / "out", "validation") == expected
    (source / "imagenet_2012_validation_synset_labels.txt").unlink()
    rows = "".join(f"ILSVRC2012_val_{i:08d},{label} 1 2 3 4\n" for i, label in enumerate(labels, 1))
    (source / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows)
    prepare(source, tmp_path / "kaggle")
    assert contents(tmp_path / "kaggle", "validation") == expected


def test_large_tars_are_cut_at_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = class_tars(tmp_path / "in", count=40)
    prepare(source, tmp_path / "whole")
    for module in (class_tars_layout, units):
        monkeypatch.setattr(module, "UNIT_BYTES", 5000)
    assert len(survey.survey(DatasetConfig(root=str(source))).units) > 20
    prepare(source, tmp_path / "cut")
    for split in ("train", "validation"):
        assert contents(tmp_path / "cut", split) == contents(tmp_path / "whole", split)


def test_a_source_in_another_file_system_gives_the_same_images(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in class_tars(tmp_path / "in").rglob("*.tar"):
        memory.pipe_file(f"/bucket/{path.relative_to(tmp_path / 'in')}", path.read_bytes())
    prepare("memory://bucket", tmp_path / "remote")
    prepare(tmp_path / "in", tmp_path / "local")
    assert contents(tmp_path / "remote", "train") == contents(tmp_path / "local", "train")


@pytest.mark.parametrize("labels", ["names", "integers"])
def test_a_hugging_face_dataset_keeps_its_splits_and_class_order(
    tmp_path: Path, labels: str
) -> None:
    import datasets

    def make_split(count: int, first: int) -> datasets.Dataset:
        rows = [(jpeg(first + i, 40, 32), i % 3) for i in range(count)]
        columns = {
            "image": [{"bytes": data, "path": None} for data, _ in rows],
            "label": [label for _, label in rows],
        }
        kind = (
            datasets.ClassLabel(names=["zebra", "ape", "cat"])
            if labels == "names"
            else datasets.Value("int64")
        )
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        return datasets.Dataset.from_dict(columns, features=features)

    source = datasets.DatasetDict({"train": make_split(30, 0), "validation": make_split(9, 900)})
    source.save_to_disk(str(tmp_path / "saved"))
    for split, rows in source.items():
        rows.to_parquet(str(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet"))
    train = {jpeg(i, 40, 32): i % 3 for i in range(30)}
    validation = {jpeg(900 + i, 40, 32): i % 3 for i in range(9)}
    for layout in ("saved", "parquet"):
        target = tmp_path / f"out-{layout}"
        prepare(tmp_path / layout, target, layout="huggingface")
        assert contents(target, "train") == train
        assert contents(target, "validation") == validation
        assert open_dataset(target).classes == (
            ["zebra", "ape", "cat"] if labels == "names" else ["0", "1", "2"]
        )
    with pytest.raises(DataError, match="no column 'picture'"):
        prepare(
            tmp_path / "saved", tmp_path / "other", layout="huggingface", image_column="picture"
        )
