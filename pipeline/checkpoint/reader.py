"""Reading ranges of parameters from a checkpoint or a weights file, whatever wrote them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.checkpoint.manifest import Manifest, TensorSlice
from pipeline.errors import CheckpointError


class RangeReader(Protocol):
    """Where parameters can be read from."""

    shapes: dict[str, list[int]]

    def read(self, kind: str, name: str, offset: int, length: int) -> Tensor: ...


class CheckpointReader:
    """Ranges of parameters from a checkpoint directory."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest, self.shapes = directory, manifest, manifest.shapes
        self._pieces: dict[str, list[TensorSlice]] = defaultdict(list)
        for piece in manifest.pieces:
            self._pieces[piece.name].append(piece)
        self._files: dict[str, Any] = {}

    def _open(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self.directory / name, "pt")
        return self._files[name]

    def read(self, kind: str, name: str, offset: int, length: int) -> Tensor:
        """Elements [offset, offset + length) of the flattened parameter, fp32, assembled from the pieces that cover it."""
        result, filled = torch.empty(length), 0
        for piece in self._pieces.get(name, []):
            start, stop = (
                max(offset, piece.offset),
                min(offset + length, piece.offset + piece.length),
            )
            if start < stop:
                source = self._open(piece.file).get_slice(f"{kind}|{name}")
                result[start - offset : stop - offset] = source[
                    start - piece.offset : stop - piece.offset
                ]
                filled += stop - start
        if filled != length:
            raise CheckpointError(
                f"parameter {name} [{offset}, {offset + length}) is covered by {filled} elements only",
                place=str(self.directory),
            )
        return result

    def full(self, kind: str, name: str) -> Tensor:
        """The whole parameter in its shape."""
        shape = torch.Size(self.shapes[name])
        return self.read(kind, name, 0, shape.numel()).view(shape)


class WeightsReader:
    """Ranges of parameters from a weights.safetensors file (which has one kind of values)."""

    def __init__(self, path: Path) -> None:
        try:
            self._file: Any = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            remedy = "run the stage that makes it again"
            raise CheckpointError(
                f"cannot be read ({error})", place=str(path), remedy=remedy
            ) from error
        names: list[str] = self._file.keys()
        self.shapes: dict[str, list[int]] = {
            name: list(self._file.get_slice(name).get_shape()) for name in names
        }

    def read(self, kind: str, name: str, offset: int, length: int) -> Tensor:
        return self.full(name).reshape(-1)[offset : offset + length]

    def full(self, name: str) -> Tensor:
        """The whole parameter, fp32."""
        value: Tensor = self._file.get_tensor(name)
        return value.float()
