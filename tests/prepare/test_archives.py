"""Cut, damaged and hostile archives (fault D3): no write outside, no other image lost."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.data.small_datasets import jpeg
from tests.prepare.results import description, keys_by_reason
from tests.prepare.source_folders import (
    class_tars,
    images,
    prepare,
    tar_bytes,
    write_tar,
)


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def add_special(tar: tarfile.TarFile, name: str, kind: bytes, target: str) -> None:
    """Add a link, a device or a pipe."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    tar.addfile(info)


def test_a_hostile_archive_writes_nothing_outside(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in")
    with tarfile.open(source / "train" / "c0.tar", "a") as tar:
        for name in ("/tmp_absolute.JPEG", "../../escaped.JPEG"):
            add_file(tar, name, jpeg(1, 40, 32))
        for name, kind in (
            ("link.JPEG", tarfile.SYMTYPE),
            ("hard.JPEG", tarfile.LNKTYPE),
            ("device", tarfile.CHRTYPE),
        ):
            add_special(tar, name, kind, target="/etc/passwd")
    metrics = prepare(source, tmp_path / "out")
    assert (metrics["images"], metrics["rejected"]) == (60, 2)
    counts = {reason: len(keys) for reason, keys in keys_by_reason(tmp_path / "out").items()}
    assert counts == {"unsafe_name": 2}, "links and devices are left out"
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_no_name_and_no_kind_of_member_writes_outside(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        names = ["/abs.JPEG", "../up.JPEG", "a/../../up.JPEG", "..", "n\n.JPEG", "x" * 5000]
        for number, name in enumerate(names):
            add_file(tar, name, jpeg(90 + number, 40, 32))
        for name, kind in (
            ("s", tarfile.SYMTYPE),
            ("h", tarfile.LNKTYPE),
            ("c", tarfile.CHRTYPE),
            ("b", tarfile.BLKTYPE),
            ("f", tarfile.FIFOTYPE),
        ):
            add_special(tar, name, kind, target=str(tmp_path / "outside"))
        add_file(tar, "s/through-a-link.JPEG", jpeg(99, 40, 32))
    (source / "train" / "c1.tar").write_bytes(out.getvalue())
    before = set(tmp_path.rglob("*"))
    prepare(source, tmp_path / "out")
    values = description(tmp_path / "out")
    assert values["rejected"] == {"unsafe_name": 4}, "links and devices are left out"
    # Kept in class 1: the names with a line break and with 5,000 letters, and s/through-a-link.
    assert values["splits"]["train"]["images_by_class"] == [20, 3, 20]
    new = set(tmp_path.rglob("*")) - before
    assert all((tmp_path / "out") in (path, *path.parents) for path in new)
    assert not any(path.is_symlink() for path in new)
    assert all(path.is_file() or path.is_dir() for path in new)
    assert not Path("/abs.JPEG").exists()


@pytest.mark.parametrize("cut", ["data", "header"])
def test_the_images_before_a_cut_are_kept(tmp_path: Path, cut: str) -> None:
    source = class_tars(tmp_path / "in")
    path = source / "train" / "c1.tar"
    with tarfile.open(path) as tar:
        eleventh = tar.getmembers()[10]
    start = eleventh.offset_data if cut == "data" else eleventh.offset
    path.write_bytes(path.read_bytes()[: start + 200])
    metrics = prepare(source, tmp_path / "out")
    assert (metrics["images"], metrics["rejected"]) == (50, 1)
    assert list(keys_by_reason(tmp_path / "out")) == ["damaged_archive"]


ARCHIVE_REASONS = {
    "damaged_archive",
    "truncated",
    "undecodable",
    "not_an_image",
    "unsafe_name",
}


@pytest.mark.parametrize("damage", ["flipped bit", "cut"])
def test_damage_of_one_archive_never_costs_another(tmp_path: Path, damage: str) -> None:
    """Archive c1 is damaged anywhere in its headers, or cut anywhere. Archive c0 is intact."""
    whole = tar_bytes(images(1, 6))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        headers = [member.offset for member in tar]
    random = np.random.default_rng(0)
    for number in range(12):
        source = tmp_path / f"in{number}"
        write_tar(source / "train" / "c0.tar", images(0, 6))
        write_tar(source / "val" / "c0.tar", images(0, 2, first=500))
        if damage == "cut":
            data = whole[: int(random.integers(1, len(whole)))]
        else:
            offset = headers[int(random.integers(6))] + int(random.integers(tarfile.BLOCKSIZE))
            flipped = whole[offset] ^ (1 << int(random.integers(8)))
            data = whole[:offset] + bytes([flipped]) + whole[offset + 1 :]
        (source / "train" / "c1.tar").write_bytes(data)
        metrics = prepare(source, tmp_path / f"out{number}")
        values = description(tmp_path / f"out{number}")
        intact, damaged = values["splits"]["train"]["images_by_class"]
        assert intact == 6
        assert damaged <= 6
        assert set(values["rejected"]) <= ARCHIVE_REASONS
        # A cut between two members cannot be noticed. A flipped bit that costs an image must be.
        if damaged < 6 and damage == "flipped bit":
            assert metrics["rejected"] >= 1
