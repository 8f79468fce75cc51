"""Links are followed, litter is left out, and no single file ends a preparation."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pipeline.config.schema import DatasetConfig
from pipeline.data.dataset import open_dataset
from pipeline.errors import DataError
from pipeline.prepare import clean
from pipeline.sources.inspection import inspect_source
from pipeline.sources.survey import survey
from tests.architecture.source_tree import ROOT
from tests.prepare.people import Album, write
from tests.prepare.results import description, keys_by_reason
from tests.prepare.source_folders import prepare, write_tar


def images_by_class(target: Path, split: str = "train") -> list[int]:
    counts: list[int] = description(target)["splits"][split]["images_by_class"]
    return counts


@pytest.mark.parametrize("linked", ["class", "split", "tar", "file"])
def test_links_are_looked_at_and_prepared_like_what_they_lead_to(
    linked: str, tmp_path: Path
) -> None:
    album = Album()
    store = album.splits(tmp_path / "store", {"train": 5, "val": 2}, ("ape", "bee"))
    root = tmp_path / "set"
    if linked == "split":
        root.mkdir()
        for split in ("train", "val"):
            os.symlink(store / split, root / split)
    else:
        for split in ("train", "val"):
            for name in ("ape", "bee"):
                source = store / split / name
                (root / split).mkdir(parents=True, exist_ok=True)
                if linked == "tar":
                    write_tar(store / f"{split}-{name}.tar", _contents(source))
                    os.symlink(store / f"{split}-{name}.tar", root / split / f"{name}.tar")
                elif linked == "class":
                    os.symlink(source, root / split / name)
                else:
                    (root / split / name).mkdir()
                    for file in source.iterdir():
                        os.symlink(file, root / split / name / file.name)
    inspected = inspect_source(DatasetConfig(root=str(root)))
    assert (inspected.images, inspected.classes, inspected.has_validation) == (10, 2, True)
    prepare(root, tmp_path / "out")
    assert images_by_class(tmp_path / "out") == [5, 5]
    assert images_by_class(tmp_path / "out", "validation") == [2, 2]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("target", ["..", ".", "../../in", "../bee/back"])
def test_a_loop_of_links_is_named_and_not_followed(target: str, tmp_path: Path) -> None:
    album = Album()
    for name in ("ape", "bee"):
        album.fill(tmp_path / "in" / name, 4)
    os.symlink(target, tmp_path / "in" / "ape" / "loop")
    if target == "../bee/back":
        os.symlink("../ape", tmp_path / "in" / "bee" / "back")
    notes: list[str] = []
    prepare(tmp_path / "in", tmp_path / "out", notes=notes, max_rejected=0.0)
    assert any("is not followed: it leads to a folder around it" in note for note in notes)
    kept = description(tmp_path / "out")
    assert sum(split["images"] for split in kept["splits"].values()) >= 8


def test_what_is_no_file_is_quarantined(tmp_path: Path) -> None:
    album = Album()
    for name in ("ape", "bee"):
        album.fill(tmp_path / "in" / name, 4)
    os.symlink("/nowhere/at/all.jpg", tmp_path / "in" / "ape" / "gone.jpg")
    os.symlink("self.jpg", tmp_path / "in" / "ape" / "self.jpg")
    os.mkfifo(tmp_path / "in" / "bee" / "pipe.jpg")
    prepare(tmp_path / "in", tmp_path / "out")
    keys = ["ape/gone.jpg", "ape/self.jpg", "bee/pipe.jpg"]
    assert sorted(keys_by_reason(tmp_path / "out")["not_a_file"]) == keys


LITTER = [
    "ape/.DS_Store",
    "ape/desktop.ini",
    "ape/.ipynb_checkpoints/1-checkpoint.jpg",
    "ape/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
    "bee/.@__thumb/1.jpg",
    "bee/LICENSE",
    "bee/readme.rst",
    "bee/1.xml",
    "bee/ape.json",
    "bee/Picasa.ini",
    "bee/._1.jpg",
]


def test_litter_is_listed_and_never_counted_as_rejected(tmp_path: Path) -> None:
    album = Album()
    for name in ("ape", "bee"):
        album.fill(tmp_path / "in" / name, 6)
    for path in LITTER:
        write(tmp_path / "in" / path)
    write(tmp_path / "in" / "__MACOSX" / "ape" / "._1.jpg")
    for folder in ("lost+found", "$RECYCLE.BIN", "System Volume Information", "#recycle"):
        (tmp_path / "in" / folder).mkdir()
    assert inspect_source(DatasetConfig(root=str(tmp_path / "in"))).images == 12
    notes: list[str] = []
    metrics = prepare(tmp_path / "in", tmp_path / "out", notes=notes, max_rejected=0.0)
    assert metrics["rejected"] == 0
    assert open_dataset(tmp_path / "out").classes == ["ape", "bee"]
    lines = (tmp_path / "out" / "quarantine" / "left_out.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in lines) == sorted(LITTER)
    assert any(f"{len(LITTER)} files are no images and are left out" in note for note in notes)


def test_links_in_a_tar_are_left_out(tmp_path: Path) -> None:
    album = Album()
    for name in ("ape", "bee"):
        write_tar(tmp_path / "in" / f"{name}.tar", {f"{i}.jpg": album.image() for i in range(4)})
    with tarfile.open(tmp_path / "in" / "ape.tar", "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type = tarfile.SYMTYPE
        link.linkname = "0.jpg"
        tar.addfile(link)
    prepare(tmp_path / "in", tmp_path / "out", max_rejected=0.0)
    assert description(tmp_path / "out")["rejected"] == {}


def test_files_that_decode_count_whatever_their_ending(tmp_path: Path) -> None:
    album = Album()
    for name, ending in (("ape", ""), ("bee", ".jpg?w=3"), ("cat", ".JFIF"), ("dog", ".tmp")):
        album.fill(tmp_path / "in" / name, 4, ending)
    metrics = prepare(tmp_path / "in", tmp_path / "out", max_rejected=0.0)
    assert metrics["images"] + metrics["validation"] == 16


@pytest.mark.parametrize(
    "error", [RuntimeError("decoder"), IndexError("header"), AttributeError("none"), KeyError(3)]
)
def test_any_exception_about_one_file_quarantines_that_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    album = Album()
    for name in ("ape", "bee"):
        album.fill(tmp_path / "in" / name, 4)
    write(tmp_path / "in" / "ape" / "odd.png", b"\x89PNG\r\n\x1a\n odd")
    decode = clean.read_header

    def failing(data: bytes, *, orientation: bool) -> object:
        if data.endswith(b"odd"):
            raise error
        return decode(data, orientation=orientation)

    monkeypatch.setattr(clean, "read_header", failing)
    prepare(tmp_path / "in", tmp_path / "out")
    line = (tmp_path / "out" / "quarantine" / "rejected.jsonl").read_text()
    entry = json.loads(line)
    assert entry["key"] == "ape/odd.png"
    assert entry["detail"] == f"{type(error).__name__}: {error}"


def test_a_source_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    album = Album()
    for name in ("ape", "bee"):
        album.fill(tmp_path / "in" / name, 4)

    def removing(function: object, items: object) -> object:
        shutil.rmtree(tmp_path / "in" / "bee")
        album.fill(tmp_path / "in" / "bee", 1)
        assert callable(function)
        for item in items:  # type: ignore[attr-defined]
            yield item, function(item)

    with pytest.raises(DataError, match="bee: has 1 files where the survey saw 4"):
        prepare(tmp_path / "in", tmp_path / "out", tasks=removing)


LOOK = """
import sys
from pipeline.config.schema import DatasetConfig
from pipeline.errors import DataError
from pipeline.sources.survey import survey
try:
    survey(DatasetConfig(root=sys.argv[1]))
except DataError as error:
    print(error.message)
"""


def test_all_files_without_permission_are_in_one_report(tmp_path: Path) -> None:
    album = Album()
    for name in ("ape", "bee"):
        album.fill(tmp_path / "in" / name, 3)
    os.chmod(tmp_path, 0o755)
    closed = [sorted((tmp_path / "in" / "ape").iterdir())[1], tmp_path / "in" / "bee"]
    for path in closed:
        os.chmod(path, 0)
    # Root reads everything: look as another user.
    command = ["unshare", "-U", "--map-user=54321", "--map-group=54321"] if not os.getuid() else []
    done = subprocess.run(
        [*command, sys.executable, "-c", LOOK, str(tmp_path / "in")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    os.chmod(closed[1], 0o755)
    if "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert "2 files or folders of the source may not be read" in done.stdout, done.stderr
    assert all(str(path) in done.stdout for path in closed)


def test_a_class_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    album = Album()
    album.fill(tmp_path / "ape", 2)
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(DataError, match=r"caf\\udce9: the name of a class is no text"):
        survey(DatasetConfig(root=str(tmp_path)))


def test_a_long_strip_of_pixels_is_quarantined_by_the_look_and_the_preparation(
    tmp_path: Path,
) -> None:
    from PIL import Image

    album = Album()
    for name in ("ape", "bee"):
        album.fill(tmp_path / "in" / name, 4)
    out = io.BytesIO()
    Image.new("L", (32, 66_000)).save(out, "PNG")
    write(tmp_path / "in" / "ape" / "scroll.png", out.getvalue())
    assert inspect_source(DatasetConfig(root=str(tmp_path / "in"))).images == 9
    prepare(tmp_path / "in", tmp_path / "out")
    assert keys_by_reason(tmp_path / "out") == {"too_long": ["ape/scroll.png"]}
