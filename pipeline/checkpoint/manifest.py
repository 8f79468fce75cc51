"""The manifest of a checkpoint, and the checkpoint directories of a stage.

A checkpoint is a directory of safetensors files, one per rank, and ``manifest.json``::

    checkpoints/pretrain/
      step-00000500/
        rank-00000.safetensors     the parameter ranges that rank 0 owns
        rank-00001.safetensors
        manifest.json              which range of which parameter lies in which file; digests
      step-00000400.refused/       damaged; set aside so that nobody reads it again
      .step-00000600.gpu-17-4711-9f86d081.tmp/  unfinished, or left behind by a killed process

The manifest describes ranges by parameter name and global shape, not by rank. So any number of
ranks, at any ZeRO stage, reads any range of any checkpoint: nothing is gathered or converted.

Example: two ranks own a parameter of 60 elements half and half. The manifest lists the slices
(offset 0, length 30, rank-00000) and (offset 30, length 30, rank-00001). Three ranks that resume
need [0, 20), [20, 40) and [40, 60); the middle one reads 10 elements of each file.

A directory has its final name only once it is complete (see `pipeline.checkpoint.writer`).
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from pipeline.errors import CheckpointError
from pipeline.files import DIGEST, file_digest, matches_digest, with_digest, write_json

FORMAT = 1
MANIFEST_JSON = "manifest.json"
LoopState = dict[str, Any]  # state of the training loop: JSON that only the trainer interprets
_NAME = re.compile(r"step-(\d{8})")  # matches the full name: no .tmp, .refused or .deleted


class FileRecord(TypedDict):
    """Size and digest (xxh3-128) of one file."""

    bytes: int
    xxh3: str


@dataclass(frozen=True, kw_only=True)
class TensorSlice:
    """Elements [offset, offset + length) of the flattened parameter ``name``.

    They are stored in ``file`` under the key ``<kind>|<name>``, once per kind of the manifest.
    """

    name: str
    offset: int
    length: int
    file: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of a checkpoint.

    ``step``: number of optimizer steps done. ``shapes``: global shape of each parameter. ``kinds``:
    the values stored for each parameter (master, exp_avg, exp_avg_sq, ema, best). ``files``: by
    name.
    """

    step: int
    shapes: dict[str, list[int]]
    kinds: list[str]
    slices: list[TensorSlice]
    files: dict[str, FileRecord]
    state: LoopState
    format: int = FORMAT

    def to_json(self) -> dict[str, object]:
        """The content of ``manifest.json``; ``slices`` are stored under the key "pieces"."""
        return {
            "step": self.step,
            "shapes": self.shapes,
            "kinds": self.kinds,
            "pieces": [asdict(part) for part in self.slices],
            "files": self.files,
            "state": self.state,
            "format": self.format,
        }

    def write(self, directory: Path) -> None:
        """Write ``manifest.json`` with a digest of its own. Raises OSError."""
        write_json(directory / MANIFEST_JSON, with_digest(self.to_json()))

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of a checkpoint directory.

        Raises:
            CheckpointError: it is missing, damaged, incomplete or has a different format.
        """
        path = directory / MANIFEST_JSON
        try:
            content = json.loads(path.read_text())
            # Compared first: other formats may have other fields. Missing or additional fields of
            # this format end in KeyError or TypeError below.
            if content["format"] != FORMAT:
                raise CheckpointError(
                    f"has format {content['format']}, this version reads {FORMAT}",
                    place=str(path),
                    remedy="resume with the version of this program that wrote it",
                )
            # Earlier versions wrote no digest.
            if not matches_digest(content):
                raise ValueError("checksum mismatch: it changed after it was written")
            content.pop(DIGEST, None)
            slices = [TensorSlice(**part) for part in content.pop("pieces")]
            return cls(slices=slices, **content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"unreadable manifest ({error})",
                place=str(path),
                remedy="delete this checkpoint; the run resumes from the previous one",
            ) from error

    def verify(self, directory: Path, names: list[str] | None = None) -> None:
        """Compare files with the manifest: the given ``names``, or all.

        Raises:
            CheckpointError: a file is missing, or its size or digest differs; names the first one.
        """
        for name in names if names is not None else list(self.files):
            path = directory / name
            expected = self.files[name]
            if not path.is_file():
                raise CheckpointError(
                    "file is missing",
                    place=str(path),
                    remedy="restore it or delete this checkpoint",
                )
            # The size comes first: it is free, and the digest of a large file takes seconds.
            if path.stat().st_size != expected["bytes"] or file_digest(path) != expected["xxh3"]:
                raise CheckpointError(
                    "checksum mismatch: the file differs from the digest in the manifest "
                    "(a damaged disk or an edited file)",
                    place=str(path),
                    remedy="restore it or delete this checkpoint; the run resumes from the "
                    "previous one",
                )


def directory_of(root: Path, step: int) -> Path:
    """Directory of the checkpoint of ``step``: ``<root>/step-00000500``."""
    return root / f"step-{step:08d}"


def step_of(directory: Path) -> int:
    """The inverse of `directory_of`."""
    return int(directory.name.removeprefix("step-"))


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every complete checkpoint, newest first."""
    if not root.is_dir():
        return []
    # The rename of the writer is the commit: a directory of this name is complete, and nothing in
    # it needs to be looked at.
    checkpoints = [
        (int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))
    ]
    return sorted(checkpoints, reverse=True)


def set_aside(directory: Path) -> Path:
    """Rename a damaged checkpoint to ``<name>.refused`` and return the new path.

    It is then neither read again nor counted among the newest ``keep`` ones, but stays available
    for an investigation. An older checkpoint of that name is deleted.
    """
    refused = directory.with_name(f"{directory.name}.refused")
    if refused.exists():
        shutil.rmtree(refused)
    return directory.rename(refused)


def remove_leftovers(root: Path) -> None:
    """Delete the hidden directories that killed writers left behind."""
    if root.is_dir():
        for path in root.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)
