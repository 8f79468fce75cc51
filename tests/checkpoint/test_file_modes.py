"""Files that appear by rename have the mode of any new file, whichever library writes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.files import write_json, write_with


@pytest.fixture(params=[0o022, 0o027, 0o002], ids="{:03o}".format)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_weights_and_descriptions_follow_the_umask(umask: int, tmp_path: Path) -> None:
    write_json(tmp_path / "new folder" / "weights.json", {})
    weights = tmp_path / "new folder" / "weights.safetensors"
    write_with(weights, lambda path: save_file({"a": torch.zeros(3)}, path))
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    file_mode = 0o666 & ~umask
    assert modes == {
        "new folder": 0o777 & ~umask,
        "weights.json": file_mode,
        "weights.safetensors": file_mode,
    }


def test_a_failed_write_leaves_neither_a_file_nor_a_temporary_one(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_with(tmp_path / "weights.safetensors", fail)
    assert not list(tmp_path.iterdir())
