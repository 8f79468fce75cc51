"""Layouts beside class folders and class tars: read, or refused with what was seen."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config.schema import DatasetConfig
from pipeline.data.dataset import open_dataset
from pipeline.errors import DataError
from pipeline.sources import units
from pipeline.sources.inspection import inspect_source
from pipeline.sources.layouts import webdataset
from pipeline.sources.survey import survey
from tests.prepare.people import Album, write
from tests.prepare.results import contents, description
from tests.prepare.source_folders import prepare, write_tar

CLASSES = ("daisy", "rose", "tulip")


def shard(path: Path, album: Album, count: int, label: Callable[[int], dict[str, bytes]]) -> None:
    """Write one shard; ``label`` gives the files beside an image by their ending."""
    files = {}
    for i in range(count):
        files[f"{path.stem}_{i:05d}.jpg"] = album.image()
        files |= {f"{path.stem}_{i:05d}.{kind}": data for kind, data in label(i).items()}
    write_tar(path, files)


LABELS: dict[str, Callable[[int], dict[str, bytes]]] = {
    "cls": lambda i: {"cls": str(i % 3 * 5).encode()},  # 0, 5 and 10: by value, not by letters
    "json": lambda i: {"json": json.dumps({"label": i % 3 * 5}).encode(), "txt": b"a caption"},
    "names": lambda i: {"cls": CLASSES[i % 3].encode()},
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("place", ["names", "folders"])
def test_webdataset_shards_are_read_with_their_labels(
    kind: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    album = Album()
    sign = "-" if place == "names" else "/"
    for number in range(2):
        path = tmp_path / "in" / f"train{sign}{number:06d}.tar"
        shard(path, album, 12, LABELS[kind])
    shard(tmp_path / "in" / f"val{sign}000000.tar", album, 6, LABELS[kind])
    for module in (webdataset, units):
        monkeypatch.setattr(module, "UNIT_BYTES", 9000)
    assert len(survey(DatasetConfig(root=str(tmp_path / "in"))).units) > 3
    inspected = inspect_source(DatasetConfig(root=str(tmp_path / "in")))
    assert (inspected.layout, inspected.images) == ("webdataset", 24)
    assert inspected.short_side == 32
    prepare(tmp_path / "in", tmp_path / "out", max_rejected=0.0)
    expected = list(CLASSES) if kind == "names" else ["0", "5", "10"]
    assert open_dataset(tmp_path / "out").classes == expected
    splits = description(tmp_path / "out")["splits"]
    assert {name: split["images_by_class"] for name, split in splits.items()} == {
        "train": [8, 8, 8],
        "validation": [2, 2, 2],
    }


def test_the_label_of_a_webdataset_image_is_that_of_its_key(tmp_path: Path) -> None:
    album = Album()
    pictures = [album.image() for _ in range(4)]
    files = {
        "a.cls": b"1",  # in front of its image
        "a.jpg": pictures[0],
        "b.jpg": pictures[1],
        "b.cls": b"0",
        "sub/c.jpg": pictures[2],
        "sub/c.cls": b"1",
        "d.seg.jpg": pictures[3],
        "d.cls": b"0",
    }
    write_tar(tmp_path / "in" / "train-000000.tar", files)
    prepare(tmp_path / "in", tmp_path / "out", splits={"train": "train"}, validation_fraction=0.4)
    kept = contents(tmp_path / "out", "train") | contents(tmp_path / "out", "validation")
    assert kept == dict(zip(pictures, [1, 0, 1, 0], strict=True))


@pytest.mark.parametrize("label", [b"-1", b"", b"null"])
def test_webdataset_images_without_a_label_are_counted(label: bytes, tmp_path: Path) -> None:
    album = Album()
    shard(tmp_path / "00000.tar", album, 6, lambda i: {"cls": label if i < 2 else b"1"})
    with pytest.raises(DataError, match="2 of 6 images of the training shards have none"):
        survey(DatasetConfig(root=str(tmp_path)))


def captions(root: Path, album: Album) -> None:
    for number in range(2):
        shard(root / f"{number:05d}.tar", album, 4, lambda i: {"txt": b"a rose", "json": b"{}"})


def caption_folders(root: Path, album: Album) -> None:
    for number in range(2):
        for image in sorted(album.fill(root / f"{number:05d}", 3).iterdir()):
            write(image.with_suffix(".txt"), b"a rose")


def stanford_dogs(root: Path, album: Album) -> None:
    for name in ("n02085620-Chihuahua", "n02086079-Pekinese"):
        album.fill(root / "Images" / name, 4)
        write(root / "Annotation" / name / "n02085620_10074", b"<annotation>")
    write(root / "lists" / "train_list.mat")


def tar_of_tars(root: Path, album: Album) -> None:
    inner = {f"{name}.tar": b"" for name in CLASSES}
    write_tar(root / "imagenet.tar", inner)


def zip_archives(root: Path, album: Album) -> None:
    for name in CLASSES:
        write(root / f"{name}.zip", b"PK\3\4")


def parquet_deeper(root: Path, album: Album) -> None:
    write(root / "v1" / "default" / "part.parquet", b"PAR1")


def one_folder_too_deep(root: Path, album: Album) -> None:
    album.splits(root / "flowers", {"train": 3, "val": 2}, CLASSES)


def one_class_folder(root: Path, album: Album) -> None:
    album.fill(root, 5)


def targa(root: Path, album: Album) -> None:
    for name in CLASSES:
        out = io.BytesIO()
        Image.new("RGB", (40, 32)).save(out, "TGA")
        write(root / name / "1.tga", out.getvalue())


def lfs_pointers(root: Path, album: Album) -> None:
    write(root / "data" / "train-00000-of-00001.parquet", b"version https://git-lfs.github.com/x\n")


@pytest.mark.parametrize(
    ("make", "seen", "remedy"),
    [
        (captions, "8 of 8 images of the training shards have none", "captions are no classes"),
        (caption_folders, "every image has a caption", "--set data.splits=none"),
        (stanford_dogs, "lie deeper, in Images", "--set data.root="),
        (tar_of_tars, "imagenet.tar: is an archive of 3 or more archives", "unpack it once"),
        (zip_archives, "3 files .zip", "unpack the archives"),
        (parquet_deeper, "1 files .parquet", "layout: huggingface"),
        (one_folder_too_deep, "lie deeper, in flowers", "/flowers"),
        (one_class_folder, "5 files .jpg", "or give the folder above"),
        (targa, "3 files .tga", "convert the images to JPEG"),
        (lfs_pointers, "pointers of Git LFS", "lfs pull"),
    ],
)
def test_what_is_not_understood_is_refused_with_what_was_seen(
    make: Callable[[Path, Album], None], seen: str, remedy: str, tmp_path: Path
) -> None:
    make(tmp_path, Album())
    with pytest.raises(DataError) as caught:
        inspect_source(DatasetConfig(root=str(tmp_path)))
    assert seen in caught.value.message
    assert remedy in caught.value.remedy


def test_an_archive_beside_class_folders_does_not_win(tmp_path: Path) -> None:
    album = Album()
    for name in CLASSES:
        album.fill(tmp_path / "in" / name, 4)
    write_tar(tmp_path / "in" / "backup.tar", {"1.jpg": album.image()})
    source = survey(DatasetConfig(root=str(tmp_path / "in")))
    assert [class_id for class_id, _ in source.classes] == list(CLASSES)
    assert source.notes == [f"not used beside the classes in {tmp_path}/in: backup.tar"]
    write_tar(tmp_path / "in" / "more.tar", {"1.jpg": album.image()})
    with pytest.raises(DataError, match=r"both tars \(backup.tar, ...\) and folders of images"):
        survey(DatasetConfig(root=str(tmp_path / "in")))


def test_a_table_beside_class_folders_does_not_win(tmp_path: Path) -> None:
    album = Album()
    for name in CLASSES:
        album.fill(tmp_path / name, 4)
    write(tmp_path / "labels.parquet", b"PAR1")
    assert survey(DatasetConfig(root=str(tmp_path))).layout == "class_folders"


def test_a_folder_of_annotations_is_no_class(tmp_path: Path) -> None:
    album = Album()
    for name in CLASSES:
        album.fill(tmp_path / name, 2)
    write(tmp_path / "xml" / "1.xml")
    source = survey(DatasetConfig(root=str(tmp_path)))
    assert len(source.classes) == 3
    assert any("xml is no class: it holds no image" in note for note in source.notes)


@pytest.mark.parametrize("name", ["__background__", "__unknown__", "_other"])
def test_names_with_underscores_are_classes_for_all(name: str, tmp_path: Path) -> None:
    album = Album()
    for folder in (name, "rose"):
        album.fill(tmp_path / "in" / folder, 6)
    assert inspect_source(DatasetConfig(root=str(tmp_path / "in"))).classes == 2
    prepare(tmp_path / "in", tmp_path / "out")
    assert open_dataset(tmp_path / "out").classes == [name, "rose"]
    assert not os.path.exists(tmp_path / "out" / "work")
