"""Labels of Hugging Face datasets: what can be trained on is, the survey refuses the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import DatasetConfig
from pipeline.data.dataset import open_dataset
from pipeline.errors import DataError
from pipeline.sources.inspection import inspect_source
from pipeline.sources.survey import survey
from tests.prepare.people import Album
from tests.prepare.results import description, keys_by_reason
from tests.prepare.source_folders import prepare

NAMES = ["ape", "bee", "cat"]


def write_split(
    root: Path, album: Album, labels: list[Any], split: str = "train", names: bool = False
) -> None:
    """Write a Parquet file as the hub has it; ``names``: the labels are indices of NAMES."""
    images = [{"bytes": album.image(), "path": f"{i}.jpg"} for i in range(len(labels))]
    table = pa.table({"image": images, "label": labels})
    if names:
        kinds = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
        features = json.dumps({"info": {"features": kinds}})
        table = table.replace_schema_metadata({"huggingface": features})
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, root / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 2, 10, 2] * 3, ["2", "10"]),
        ([0.0, 1.0] * 6, ["0", "1"]),
        ([True, False] * 6, ["False", "True"]),
        (["10", "2"] * 6, ["10", "2"]),
        (["b", "a"] * 6, ["a", "b"]),
    ],
)
def test_labels_of_many_kinds_are_classes(
    labels: list[Any], classes: list[str], tmp_path: Path
) -> None:
    write_split(tmp_path / "in" / "data", Album(), labels)
    (tmp_path / "in" / "README.md").write_text("a cloned repository")
    inspected = inspect_source(DatasetConfig(root=str(tmp_path / "in")))
    assert (inspected.layout, inspected.images) == ("huggingface", 12)
    assert inspected.short_side == 32
    prepare(tmp_path / "in", tmp_path / "out", validation_fraction=0.3)
    assert open_dataset(tmp_path / "out").classes == classes


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 1, 2, -1, -1, 0], True),
        ([0, 1, None, None, 1, 0], False),
        (["a", None, "b", None, "a", "b"], False),
        ([0.0, float("nan"), 1.0, None, 1.0, 0.0], False),
    ],
)
def test_missing_labels_are_refused_with_counts_and_split(
    labels: list[Any], names: bool, tmp_path: Path
) -> None:
    write_split(tmp_path, Album(), labels, names=names)
    with pytest.raises(DataError, match=r"labels are missing .* 2 of 6 rows of the training split"):
        survey(DatasetConfig(root=str(tmp_path)))


@pytest.mark.parametrize(
    "labels", [[[0, 1], [1]] * 3, [0.5, 1.25] * 3, [{"a": 1}] * 6, [b"x", b"y"] * 3]
)
def test_labels_that_are_no_classes_are_refused(labels: list[Any], tmp_path: Path) -> None:
    write_split(tmp_path, Album(), labels)
    with pytest.raises(DataError, match="its labels are no classes but values such as"):
        survey(DatasetConfig(root=str(tmp_path)))


@pytest.mark.parametrize("splits", [["train", "test"], ["train", "validation", "test"]])
def test_hidden_test_labels_are_no_split(splits: list[str], tmp_path: Path) -> None:
    album = Album()
    for split in splits:
        labels = [-1] * 4 if split == "test" else [i % 3 for i in range(12)]
        write_split(tmp_path / "in", album, labels, split, names=True)
    notes: list[str] = []
    prepare(tmp_path / "in", tmp_path / "out", notes=notes, validation_fraction=0.3)
    assert "set: the split test is not used: its images have no labels" in notes
    assert list(description(tmp_path / "out")["splits"]) == ["train", "validation"]


def test_a_class_of_the_validation_split_alone_is_refused(tmp_path: Path) -> None:
    album = Album()
    write_split(tmp_path, album, ["a", "b"] * 3)
    write_split(tmp_path, album, ["a", "d"], "validation")
    with pytest.raises(DataError, match=r"1 classes of the validation images .*: d"):
        survey(DatasetConfig(root=str(tmp_path)))


def test_images_at_paths_are_found_beside_the_table_or_rejected(tmp_path: Path) -> None:
    album = Album()
    files = sorted(album.fill(tmp_path / "in" / "img", 9).iterdir())
    paths = [f"img/{file.name}" for file in files] + ["img/gone.jpg"]
    table = pa.table({"image": paths, "label": [i % 2 for i in range(10)]})
    pq.write_table(table, tmp_path / "in" / "train.parquet")
    prepare(tmp_path / "in", tmp_path / "out", layout="huggingface", validation_fraction=0.3)
    assert keys_by_reason(tmp_path / "out") == {"missing_file": ["train/000000009"]}


@pytest.mark.parametrize("content", [b"", b"PAR1 damaged", b"PAR1" + bytes(500) + b"PAR1"])
def test_a_damaged_table_is_an_error_with_its_cause(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(DataError, match="`datasets` cannot load it"):
        survey(DatasetConfig(root=str(tmp_path)))
