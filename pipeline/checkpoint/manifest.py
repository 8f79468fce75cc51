"""A checkpoint is a directory of safetensors files and a manifest with their sizes, digests and contents.

Each rank writes the ranges of parameters that it owns; the manifest lists which range of which parameter lies in which
file, by name and global shape. So any number of ranks, at any ZeRO stage, can read any range: nothing is gathered and
nothing is converted. The directory appears under its name only when it is complete (rename), and a file whose digest
differs is refused by name.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.files import file_digest

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class TensorSlice:
    """Elements [offset, offset + length) of the flattened parameter ``name``; in ``file`` under ``<kind>|<name>``."""

    name: str
    offset: int
    length: int
    file: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    step: int
    shapes: dict[str, list[int]]
    kinds: list[str]  # master, exp_avg, exp_avg_sq, ema
    pieces: list[TensorSlice]
    files: dict[str, dict[str, Any]]  # name -> {"bytes": size, "xxh3": digest}
    state: dict[str, Any]  # of the training loop
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises CheckpointError when it is missing, not JSON, or of another format."""
        path = directory / "manifest.json"
        try:
            value = json.loads(path.read_text())
            if value["format"] != FORMAT:
                cause = f"has format {value['format']}, this version reads {FORMAT}"
                raise CheckpointError(
                    cause,
                    place=str(path),
                    remedy="go on with the version of this program that wrote it",
                )
            value["pieces"] = [TensorSlice(**piece) for piece in value["pieces"]]
            return cls(**value)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"unreadable manifest ({error})",
                place=str(path),
                remedy="delete this checkpoint; the one before is used",
            ) from error

    def verify(self, directory: Path, names: list[str] | None = None) -> None:
        """Raises CheckpointError naming the first file that is missing, of another size, or of another digest."""
        for name in names if names is not None else list(self.files):
            path, expected = directory / name, self.files[name]
            if not path.is_file():
                raise CheckpointError(
                    "file is missing",
                    place=str(path),
                    remedy="restore it or delete this checkpoint",
                )
            if path.stat().st_size != expected["bytes"] or file_digest(path) != expected["xxh3"]:
                raise CheckpointError(
                    "content differs from the digest in the manifest (a damaged disk or an edited file)",
                    place=str(path),
                    remedy="restore it or delete this checkpoint; the one before is used",
                )


def directory_of(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return root / f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every complete checkpoint, newest first."""
    if not root.is_dir():
        return []
    found = [
        (int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))
    ]
    return sorted(found, reverse=True)


def set_aside(directory: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither read again nor counted among those that are kept."""
    refused = directory.with_name(f"{directory.name}.refused")
    if refused.exists():
        shutil.rmtree(refused)
    return directory.rename(refused)


def remove_leftovers(root: Path) -> None:
    """Delete what killed writers left behind."""
    if root.is_dir():
        for path in root.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)


def keep_newest(root: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints; renamed first, so that none is ever half there."""
    for _, path in list_checkpoints(root)[keep:]:
        doomed = path.with_name(f".{path.name}.deleted")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
