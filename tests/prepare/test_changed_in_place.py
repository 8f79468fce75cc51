"""A source that changed in place is noticed; a copy, or other times alone, is the same source."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pipeline.config.schema import DatasetConfig
from pipeline.layout import SOURCE_TIMES
from pipeline.prepare.forecast import expected_fingerprint
from tests.data.small_datasets import jpeg
from tests.prepare.people import Album
from tests.prepare.results import contents, description
from tests.prepare.source_folders import prepare, shard_bytes, write_tar


def source(root: Path) -> Path:
    album = Album()
    for name in ("ape", "bee"):
        album.fill(root / name, 5)
    return root


def padded(data: bytes, size: int) -> bytes:
    """Another image of as many bytes: decoders ignore what follows the end."""
    assert len(data) <= size
    return data.ljust(size, b"\0")


def swapped_names(root: Path) -> None:
    """Two images exchange their names: neither number nor bytes of the class change."""
    first, second = sorted((root / "ape").iterdir())[:2]
    other = sorted((root / "bee").iterdir())[0]
    data = [first.read_bytes(), second.read_bytes(), other.read_bytes()]
    size = max(map(len, data))
    for path, content in zip((first, second, other), data, strict=True):
        path.write_bytes(padded(content, size))
    first.write_bytes(padded(data[2], size))
    other.write_bytes(padded(data[0], size))


def other_pixels(root: Path) -> None:
    image = sorted((root / "ape").iterdir())[0]
    image.write_bytes(padded(jpeg(900, 24, 16), image.stat().st_size))


def other_label(root: Path) -> None:
    """A file of a tar is replaced: the tar keeps its size."""
    write_tar(root / "cat.tar", {"1.jpg": padded(jpeg(901, 24, 16), 900), "2.jpg": jpeg(3, 40, 32)})


def as_tars(root: Path) -> None:
    for folder in list(root.iterdir()):
        write_tar(root / f"{folder.name}.tar", {p.name: p.read_bytes() for p in folder.iterdir()})
        shutil.rmtree(folder)


@pytest.mark.parametrize("change", ["pixels", "swap", "tar"])
def test_other_bytes_under_the_same_names_and_sizes_are_noticed(
    change: str, tmp_path: Path
) -> None:
    root = source(tmp_path / "in")
    if change == "swap":
        for path in root.rglob("*.jpg"):
            path.write_bytes(padded(path.read_bytes(), 3000))
    if change == "tar":
        as_tars(root)
    prepare(root, tmp_path / "out")
    before = description(tmp_path / "out")["fingerprint"]
    if change == "pixels":
        other_pixels(root)
    elif change == "swap":
        swapped_names(root)
    else:
        tar = root / "ape.tar"
        data = bytearray(tar.read_bytes())
        at = data.index(b"\xff\xda") + 40  # in the compressed pixels of the first image
        data[at] ^= 0x11
        tar.write_bytes(bytes(data))
    config = DatasetConfig(root=str(root), min_side=16)
    assert expected_fingerprint(tmp_path / "out", config, 0) != before
    prepare(root, tmp_path / "out")
    after = description(tmp_path / "out")["fingerprint"]
    assert after == expected_fingerprint(tmp_path / "out", config, 0)
    assert after != before
    prepare(root, tmp_path / "fresh")
    for split in ("train", "validation"):
        assert contents(tmp_path / "out", split) == contents(tmp_path / "fresh", split)
    # A third call has nothing to do.
    shards = shard_bytes(tmp_path / "out")
    prepare(root, tmp_path / "out")
    assert shard_bytes(tmp_path / "out") == shards
    assert len(list(tmp_path.glob("out.replaced-*"))) == 1


@pytest.mark.parametrize("change", ["touched", "copied"])
def test_other_times_alone_change_nothing(change: str, tmp_path: Path) -> None:
    root = source(tmp_path / "in")
    prepare(root, tmp_path / "out")
    before = shard_bytes(tmp_path / "out")
    if change == "copied":
        shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
        root = tmp_path / "copy"
    for path in root.rglob("*.jpg"):
        os.utime(path, (1, 1))
    prepare(root, tmp_path / "out")
    assert shard_bytes(tmp_path / "out") == before
    assert list(tmp_path.glob("out.replaced-*")) == []


def test_a_set_of_the_version_before_is_accepted_without_preparing_it_again(
    tmp_path: Path,
) -> None:
    """It has no times, no digests, and lacks the newer keys."""
    root = source(tmp_path / "in")
    prepare(root, tmp_path / "out")
    path = tmp_path / "out" / "dataset.json"
    values = json.loads(path.read_text())
    for name in ("source_content", "classes_digest", "digest"):
        del values[name]
    del values["settings"]["exif_orientation"]
    path.write_text(json.dumps(values))
    (tmp_path / "out" / SOURCE_TIMES).unlink()
    shards = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.parquet")}
    prepare(root, tmp_path / "out", exif_orientation="apply")
    assert {file: file.stat().st_mtime_ns for file in shards} == shards
    assert list(tmp_path.glob("out.replaced-*")) == []
