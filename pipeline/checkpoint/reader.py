"""Reads ranges of parameters from a checkpoint, whichever ranks wrote them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.checkpoint.manifest import Manifest, TensorSlice
from pipeline.errors import CheckpointError


class LazyTensor(Protocol):
    """A tensor in a file; indexing reads the selected elements only."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, elements: slice, /) -> Tensor: ...


class SafeTensors(Protocol):
    """The members of safetensors' file handle that are used here (the library ships no types)."""

    def keys(self) -> Iterable[str]: ...

    def get_slice(self, name: str) -> LazyTensor: ...

    def get_tensor(self, name: str) -> Tensor: ...


class RangeReader(Protocol):
    """A source of parameter values.

    ``shapes``: global shape of each parameter. ``kind``: master, exp_avg, exp_avg_sq or ema.
    """

    shapes: dict[str, list[int]]

    def read(self, kind: str, name: str, offset: int, length: int) -> Tensor:
        """Elements [offset, offset + length) of the flattened parameter: fp32, shape (length,)."""


class CheckpointReader:
    """Ranges of parameters from a checkpoint directory. Opens each file on first use."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self.shapes = manifest.shapes
        self._slices: dict[str, list[TensorSlice]] = defaultdict(list)
        for part in manifest.slices:
            self._slices[part.name].append(part)
        self._files: dict[str, SafeTensors] = {}

    def read(self, kind: str, name: str, offset: int, length: int) -> Tensor:
        """Elements [offset, offset + length) of the flattened parameter: fp32, shape (length,).

        Example: slices [0, 30) and [30, 60) are stored, and [20, 40) is wanted. The first slice
        gives its elements 20..29 to result[0:10], the second its elements 0..9 to result[10:20].

        Raises:
            CheckpointError: the stored slices do not cover the range.
        """
        # The slices of a parameter do not overlap (each element has one owner), so counting the
        # copied elements shows whether all of them are covered.
        result = torch.empty(length)
        filled = 0
        for part in self._slices.get(name, []):
            # Overlap of the slice and the wanted range, in elements of the whole parameter.
            start = max(offset, part.offset)
            stop = min(offset + length, part.offset + part.length)
            if start < stop:
                stored = self._open(part.file).get_slice(f"{kind}|{name}")
                overlap = stored[start - part.offset : stop - part.offset]
                result[start - offset : stop - offset] = overlap
                filled += stop - start
        if filled != length:
            raise CheckpointError(
                f"parameter {name} [{offset}, {offset + length}) is covered by {filled} elements "
                "only",
                place=str(self.directory),
            )
        return result

    def full(self, kind: str, name: str) -> Tensor:
        """The whole parameter in its global shape, fp32. Raises CheckpointError like `read`."""
        shape = torch.Size(self.shapes[name])
        return self.read(kind, name, 0, shape.numel()).view(shape)

    def _open(self, name: str) -> SafeTensors:
        # Opening maps the file and reads its header. Every rank reads ranges of all parameters, so
        # it opens each file once and not once per range.
        if name not in self._files:
            self._files[name] = open_safetensors(self.directory / name)
        return self._files[name]


def open_safetensors(path: Path) -> SafeTensors:
    """Open a file. Raises OSError or SafetensorError."""
    return cast(SafeTensors, safe_open(path, "pt"))
