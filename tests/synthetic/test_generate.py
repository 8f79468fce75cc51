"""Synthetic sources: reproducible, disjoint, in the real layouts, with corrupt files, learnable."""

from __future__ import annotations

import gzip
import pickle
import random
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.schema import DatasetConfig, SyntheticConfig
from pipeline.data.decode import decode_any, decode_jpeg
from pipeline.errors import ConfigError
from pipeline.files import digest
from pipeline.sources.class_lists import class_list
from pipeline.synthetic import contents as file_contents
from pipeline.synthetic import generate
from pipeline.synthetic.contents import CORRUPT_KINDS, encode_unusual
from pipeline.synthetic.drawing import draw_image

MIN = 48
MAX = 80


def settings(layout: str = "class_tars", listed: str = "auto", **synthetic: Any) -> DatasetConfig:
    defaults = {
        "min_size": MIN,
        "max_size": MAX,
        "classes": 4,
        "images_per_class": 6,
        "validation_per_class": 3,
        "corrupt_fraction": 0.5,
    }
    return DatasetConfig.model_validate(
        {
            "layout": layout,
            "classes": listed,
            "synthetic": SyntheticConfig.model_validate(defaults | synthetic),
        }
    )


def build(config: DatasetConfig, target: Path, order: int | None = None) -> Path:
    files = generate.plan_files(config, target)
    if order is not None:
        random.Random(order).shuffle(files)
    for file in files:
        generate.write_file(pickle.loads(pickle.dumps(file)))
    generate.finish_source(config, target)
    return target


def contents(target: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(target)): path.read_bytes()
        for path in target.rglob("*")
        if path.is_file()
    }


def members(tar: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=BytesIO(tar)) as opened:
        files = {info.name: opened.extractfile(info) for info in opened}
        return {name: file.read() for name, file in files.items() if file is not None}


def images(target: Path, split: str) -> dict[str, bytes]:
    return {
        name: data
        for path in (target / split).glob("*.tar")
        for name, data in members(path.read_bytes()).items()
    }


@pytest.mark.parametrize("layout", ["class_tars", "class_folders", "imagenet_tars"])
def test_bytes_are_the_same_in_any_order_after_a_repeat_and_after_an_interruption(
    layout: str, tmp_path: Path
) -> None:
    config = settings(layout)
    first = contents(build(config, tmp_path / "a"))
    assert contents(build(config, tmp_path / "b", order=1)) == first
    (target := tmp_path / "c").mkdir()
    for file in generate.plan_files(config, target)[1::2]:
        generate.write_file(file)
    (target / "train").mkdir(exist_ok=True)
    (target / "train" / ".n1.tar.7.tmp").write_bytes(b"left by a killed process")
    assert contents(build(config, target)) == first
    before = {
        path: path.stat().st_mtime_ns
        for path in target.rglob("*")
        if path.suffix in (".tar", ".JPEG")
    }
    assert contents(build(config, target)) == first
    assert before == {path: path.stat().st_mtime_ns for path in before}, (
        "finished files are left alone"
    )


def test_a_missing_tar_is_written_again(tmp_path: Path) -> None:
    config = settings()
    first = contents(build(config, tmp_path))
    next((tmp_path / "train").glob("*.tar")).unlink()
    assert contents(build(config, tmp_path)) == first


def test_an_interruption_between_the_two_imagenet_archives_is_recovered(tmp_path: Path) -> None:
    config = settings("imagenet_tars")
    first = contents(build(config, tmp_path))
    (tmp_path / "ILSVRC2012_img_val.tar").unlink()
    assert contents(build(config, tmp_path)) == first


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    for layout in ("class_tars", "class_folders"):
        target = tmp_path / layout
        file = generate.plan_files(settings(layout), target)[0]
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(file_contents, "draw_image", fail)
            generate.write_file(file)
        assert not list((target / "train").iterdir())


def test_no_image_occurs_in_two_splits_or_two_seeds(tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("n00000001\nn00000002\n")
    config = settings(listed=str(ids), classes=2, corrupt_fraction=0.0)
    digests_per_split = [
        {digest(data) for data in images(target, split).values()}
        for target in (build(config, tmp_path / "0"), build(_seeded(config, 1), tmp_path / "1"))
        for split in ("train", "val")
    ]
    assert [len(digests) for digests in digests_per_split] == [12, 6, 12, 6]
    assert len(set().union(*digests_per_split)) == 36
    assert not (tmp_path / "0" / "synsets.txt").exists()


def _seeded(config: DatasetConfig, seed: int) -> DatasetConfig:
    assert config.synthetic is not None
    return config.model_copy(
        update={"synthetic": config.synthetic.model_copy(update={"seed": seed})}
    )


def test_images_have_the_configured_sizes_and_varied_shapes(tmp_path: Path) -> None:
    shapes = [
        decode_jpeg(data).shape
        for data in images(build(settings(corrupt_fraction=0.0), tmp_path), "train").values()
    ]
    assert all(MIN <= side <= MAX for shape in shapes for side in shape[:2])
    assert len(set(shapes)) > len(shapes) // 2
    assert draw_image(0, "n1", "train", 0, (64, 64)).shape == (64, 64, 3)
    height, width, _ = draw_image(0, "n1", "train", 0, (700, 1200)).shape
    assert 700 <= min(height, width) <= max(height, width) <= 1200


def test_classes_are_drawn_from_the_class_list_and_keep_its_order(tmp_path: Path) -> None:
    target = build(settings(), tmp_path)
    drawn = (target / "synsets.txt").read_text().split()
    assert drawn == sorted(drawn, key=class_list("fall11_21841").index)
    assert len(drawn) == 4
    assert (
        {path.stem for path in target.glob("train/*")}
        == {path.stem for path in target.glob("val/*")}
        == set(drawn)
    )
    assert _names(settings(listed="imagenet1k")) <= set(class_list("imagenet1k"))
    with pytest.raises(ConfigError, match="has 1000"):
        _names(settings(listed="imagenet1k", classes=1001))


def _names(config: DatasetConfig) -> set[str]:
    return {file.path.stem for file in generate.plan_files(config, Path("nowhere"))}


def test_imagenet_tars_has_the_published_layout(tmp_path: Path) -> None:
    files = contents(build(settings("imagenet_tars", corrupt_fraction=0.05), tmp_path))
    labels = files["imagenet_2012_validation_synset_labels.txt"].decode().split()
    train = members(files["ILSVRC2012_img_train.tar"])
    val = members(files["ILSVRC2012_img_val.tar"])
    assert set(files) == {
        "ILSVRC2012_img_train.tar",
        "ILSVRC2012_img_val.tar",
        "imagenet_2012_validation_synset_labels.txt",
        "synsets.txt",
    }
    assert set(train) == {f"{wnid}.tar" for wnid in labels}
    assert len(train) == 4
    assert list(val) == [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 13)]
    assert labels != sorted(labels)
    for name, tar in train.items():
        assert all(member.startswith(f"{name.removesuffix('.tar')}_") for member in members(tar))


@pytest.mark.parametrize("layout", ["class_tars", "imagenet_tars"])
def test_every_kind_of_corrupt_file_occurs(layout: str, tmp_path: Path) -> None:
    config = settings(layout)
    kinds = generate.corrupt_counts(config)
    assert kinds == dict.fromkeys(CORRUPT_KINDS, 1)
    files = contents(build(config, tmp_path))
    if layout == "class_tars":
        train = images(tmp_path, "train")
        val = images(tmp_path, "val")
    else:
        inner = members(files["ILSVRC2012_img_train.tar"]).values()
        train = {name: data for tar in inner for name, data in members(tar).items()}
        val = members(files["ILSVRC2012_img_val.tar"])
    assert len(train) == 4 * 6 + sum(kinds.values())
    assert sorted(_kinds(train, set(val.values()))) == sorted(CORRUPT_KINDS)


def _kinds(train: dict[str, bytes], val: set[bytes]) -> list[str]:
    """The kind of each file that is not an ordinary image, judged by its bytes."""
    seen: set[bytes] = set()
    kinds = []
    for name, data in train.items():
        kind = (
            "duplicate"
            if data in seen
            else "validation_duplicate"
            if data in val
            else _kind(name, data)
        )
        seen.add(data)
        kinds += [kind] if kind else []
    return kinds


def _kind(name: str, data: bytes) -> str:
    if name == ".DS_Store" or name.startswith("._"):
        return "stray"
    if not data:
        return "empty"
    if data.startswith(b"\x1f\x8b"):
        return "gzip" if decode_jpeg(gzip.decompress(data)).ndim == 3 else "damaged"
    if data.startswith(b"\x89PNG"):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        return "deep" if image is not None and image.dtype == np.uint16 else "png"
    if not data.startswith(b"\xff\xd8\xff"):
        return "text"
    try:
        simplejpeg.decode_jpeg(data, strict=True)
    except ValueError as error:
        if "remature" in str(error):
            return "truncated"
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    if min(height, width) < 32:
        return "small"
    return {"Gray": "grey", "CMYK": "cmyk", "YCCK": "cmyk"}.get(space, "")


def test_unusual_encodings_show_the_same_image() -> None:
    image = draw_image(0, "n1", "train", 0, (64, 64))
    encoded = {kind: encode_unusual(image, kind, 16) for kind in ("png", "deep", "cmyk")}
    assert np.array_equal(decode_any(encoded["png"]), image)
    assert np.array_equal(decode_any(encoded["deep"]), image)
    with Image.open(BytesIO(encoded["cmyk"])) as opened:
        assert opened.mode == "CMYK"
        assert np.abs(np.asarray(opened.convert("RGB")).astype(int) - image).mean() < 8


def test_corrupt_files_have_the_configured_share_and_are_spread_over_the_classes() -> None:
    config = settings(classes=24, images_per_class=60, corrupt_fraction=0.05)
    counts = [
        len(file.corrupt)
        for file in generate.plan_files(config, Path("nowhere"))
        if file.split == "train"
    ]
    assert sum(counts) == sum(generate.corrupt_counts(config).values()) == 72
    assert max(counts) == min(counts) == 3
    assert not generate.corrupt_counts(settings(corrupt_fraction=0.0))
    assert sum(generate.corrupt_counts(settings(corrupt_fraction=0.001)).values()) == 1


def test_classes_can_be_learned_but_not_from_the_mean_colour() -> None:
    """Centroids of one seed classify the images of another: chance is 0.125 for 8 classes."""
    wnids = class_list("imagenet1k")[::125]
    colours, histograms = (
        [
            np.array([[feature(seed, wnid, n) for n in range(30)] for wnid in wnids])
            for seed in (0, 1)
        ]
        for feature in (_mean_colour, _histogram)
    )
    assert 0.25 < _accuracy(*histograms) < 0.85
    assert _accuracy(*colours) < min(0.45, _accuracy(*histograms))


def _pixels(seed: int, wnid: str, number: int) -> NDArray[np.uint8]:
    return draw_image(seed, wnid, "train", number, (64, 64))


def _mean_colour(seed: int, wnid: str, number: int) -> NDArray[np.float64]:
    return np.asarray(_pixels(seed, wnid, number).mean(axis=(0, 1)), np.float64)


def _histogram(seed: int, wnid: str, number: int) -> NDArray[np.float64]:
    hsv = cv2.cvtColor(_pixels(seed, wnid, number), cv2.COLOR_RGB2HSV)
    counts = cv2.calcHist([hsv], [0, 1, 2], None, [12, 4, 3], [0, 180, 0, 256, 0, 256]).ravel()
    return np.sqrt(counts / counts.sum()).astype(np.float64)


def _accuracy(train: NDArray[np.float64], val: NDArray[np.float64]) -> float:
    """Accuracy of nearest centroids; both arrays have shape (classes, images, features)."""
    distances = np.linalg.norm(val[:, :, None] - train.mean(axis=1), axis=-1)
    return float((distances.argmin(axis=-1) == np.arange(len(val))[:, None]).mean())
