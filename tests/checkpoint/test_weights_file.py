"""Weights files carry a digest of themselves, and stay ordinary safetensors."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.weights import initial_weights
from pipeline.checkpoint.weights_file import (
    DIGEST_KEY,
    verify_weights_file,
    write_weights_file,
)
from pipeline.errors import CheckpointError
from pipeline.layout import RunDir

TENSORS = {
    "stem.weight": torch.arange(300, dtype=torch.float32).view(3, 100),
    "größe": torch.ones(7, dtype=torch.float16),
    "steps": torch.tensor(5),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    write_weights_file(path, TENSORS, {"format": "pt"})
    return path


def test_the_file_is_ordinary_safetensors_with_a_digest(path: Path) -> None:
    loaded = load_file(path)
    assert set(loaded) == set(TENSORS)
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert len(metadata[DIGEST_KEY]) == 32
    verify_weights_file(path)


def test_the_digest_travels_with_a_copy_under_another_name(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "mine.safetensors"
    copy.parent.mkdir()
    shutil.copy(path, copy)
    verify_weights_file(copy)
    damage(copy, -1)
    with pytest.raises(CheckpointError, match=r"mine\.safetensors: checksum mismatch"):
        verify_weights_file(copy)


def damage(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_any_changed_bit_is_noticed(path: Path) -> None:
    """Except in the name of the digest itself, without which the file says nothing wrong."""
    content = path.read_bytes()
    key = content.index(DIGEST_KEY.encode())
    for offset in range(0, len(content), 7):
        if key <= offset < key + len(DIGEST_KEY):
            continue
        damage(path, offset)
        with pytest.raises(CheckpointError):
            initial_weights(RunDir(path.parent), str(path))
        path.write_bytes(content)


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", struct.pack("<Q", 1 << 60) + b"{}", b"\0" * 99],
    ids=["empty", "short", "endless header", "zeros"],
)
def test_another_kind_of_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be read"):
        verify_weights_file(path)


def test_a_truncated_file_is_noticed(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="checksum mismatch"):
        verify_weights_file(path)


def test_a_file_from_elsewhere_has_no_digest_and_passes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "published.safetensors")
    verify_weights_file(tmp_path / "published.safetensors")


def test_equal_tensors_give_equal_files_in_any_process(path: Path) -> None:
    """safetensors orders metadata at random, differently in each process."""
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.checkpoint.test_weights_file import TENSORS, write_weights_file\n"
        "for number in range(20):\n"
        "    write_weights_file(Path(sys.argv[1]) / str(number), TENSORS, {'format': 'pt'})\n"
    )
    folder = path.parent / "others"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    assert {file.read_bytes() for file in folder.iterdir()} == {path.read_bytes()}


def test_from_refuses_damaged_weights_before_it_reads_them(path: Path, tmp_path: Path) -> None:
    assert initial_weights(RunDir(tmp_path), str(path)).shapes["stem.weight"] == [3, 100]
    damage(path, -3)
    with pytest.raises(CheckpointError, match="checksum mismatch") as error:
        initial_weights(RunDir(tmp_path), str(path))
    assert "rerun the stage that writes it" in error.value.remedy
