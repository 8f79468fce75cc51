"""Checkpoints as files: any range is readable, only complete ones are listed, damage is named."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.checkpoint.manifest import (
    FileRecord,
    Manifest,
    TensorSlice,
    list_checkpoints,
    remove_leftovers,
    set_aside,
)
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.retention import Retention, delete_others
from pipeline.checkpoint.weights_reader import WeightsReader
from pipeline.errors import CheckpointError
from pipeline.files import file_digest, json_digest

TOTAL = 60


def write(directory: Path, cuts: list[int], missing: int = -1) -> torch.Tensor:
    """Write a checkpoint of one parameter (3, 20), cut at ``cuts`` into slices, one file each.

    Leaves out the slice number ``missing``. Returns the values of the parameter, flattened.
    """
    whole = torch.randn(TOTAL, generator=torch.Generator().manual_seed(0))
    bounds = sorted({0, TOTAL, *cuts})
    slices: list[TensorSlice] = []
    files: dict[str, FileRecord] = {}
    directory.mkdir(parents=True)
    for rank, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if rank == missing:
            continue
        name = f"rank-{rank:05d}.safetensors"
        path = directory / name
        save_file({"master|p": whole[start:stop].clone()}, path)
        slices.append(TensorSlice(name="p", offset=start, length=stop - start, file=name))
        files[name] = {"bytes": path.stat().st_size, "xxh3": file_digest(path)}
    manifest = Manifest(
        step=7, shapes={"p": [3, 20]}, kinds=["master"], slices=slices, files=files, state={}
    )
    manifest.write(directory)
    return whole


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, TOTAL), max_size=5), st.integers(0, TOTAL), st.integers(0, TOTAL))
def test_any_range_is_read_from_any_slices(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], a: int, b: int
) -> None:
    directory = tmp_path_factory.mktemp("c") / "step-00000007"
    whole = write(directory, cuts)
    first, last = sorted((a, b))
    reader = CheckpointReader(directory, Manifest.read(directory))
    assert torch.equal(reader.read("master", "p", first, last - first), whole[first:last])
    assert torch.equal(reader.full("master", "p"), whole.view(3, 20))


def test_missing_slice_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "c", [20, 40], missing=1)
    reader = CheckpointReader(tmp_path / "c", Manifest.read(tmp_path / "c"))
    assert reader.read("master", "p", 0, 20).shape == (20,)
    with pytest.raises(CheckpointError, match="covered by 40 elements"):
        reader.full("master", "p")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (Path.unlink, "missing"),
        (_flip, "checksum mismatch.*digest"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "digest"),
    ],
    ids=["deleted", "bit flipped", "truncated"],
)
def test_verify_names_the_damaged_file(
    harm: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "c", [30])
    manifest = Manifest.read(tmp_path / "c")
    manifest.verify(tmp_path / "c")
    harm(tmp_path / "c" / "rank-00001.safetensors")
    manifest.verify(tmp_path / "c", ["rank-00000.safetensors"])
    with pytest.raises(CheckpointError, match=rf"rank-00001\.safetensors(.|\n)*{message}"):
        manifest.verify(tmp_path / "c")


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", '{"format": 2}', '{"format": 1, "step": 3}']
)
def test_unreadable_manifest_is_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        Manifest.read(tmp_path)


def test_manifest_file_has_the_keys_of_format_1(tmp_path: Path) -> None:
    write(tmp_path / "c", [])
    path = tmp_path / "c" / "rank-00000.safetensors"
    stored = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert stored.pop("digest") == json_digest(stored)
    assert stored == {
        "step": 7,
        "shapes": {"p": [3, 20]},
        "kinds": ["master"],
        "pieces": [{"name": "p", "offset": 0, "length": 60, "file": path.name}],
        "files": {path.name: {"bytes": path.stat().st_size, "xxh3": file_digest(path)}},
        "state": {},
        "format": 1,
    }


def test_only_complete_checkpoints_are_listed_and_the_newest_kept(tmp_path: Path) -> None:
    for name in (
        "step-00000004",
        "step-00000012",
        "step-00000008",
        ".step-00000016.99.tmp",
        "step-1",
        "other",
    ):
        (tmp_path / name).mkdir()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [12, 8, 4]
    assert set_aside(tmp_path / "step-00000012").name == "step-00000012.refused"
    remove_leftovers(tmp_path)
    delete_others(tmp_path, Retention(last=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other",
        "step-00000008",
        "step-00000012.refused",
        "step-1",
    ]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_file_that_is_not_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        WeightsReader(tmp_path / "w.safetensors")
