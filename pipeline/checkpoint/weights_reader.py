"""Reads weights under our names, whatever wrote the file: this project, the published code, timm.

runs/a/stages/pretrain/weights.safetensors   our names
revcol_tiny_1k.pth                           published names, in entries such as 'model'
export/hub/model.safetensors                 our names, alpha of shape (1, C, 1, 1)
model.safetensors.index.json                 names of the files that share out such weights
revcol_tiny_1k.pth#model                     that entry, although the file has a better one
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from torch import Tensor

from pipeline.checkpoint.published_names import are_published, our_names, our_shape
from pipeline.checkpoint.reader import SafeTensors, open_safetensors
from pipeline.checkpoint.torch_file import WHOLE, read_torch_file
from pipeline.checkpoint.weights_source import TORCH_SUFFIXES
from pipeline.errors import CheckpointError
from pipeline.layout import SHARDED_WEIGHTS

# What wrappers put before every name: DDP, torch.compile, other trainers, transformers.
_PREFIXES = ("module.", "_orig_mod.", "model.", "timm_model.", "network.")


class _Stored(Protocol):
    """Tensors by the names that they have in a file."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def tensor(self, name: str) -> Tensor: ...


class _TorchTensors:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(tensor.shape)
            for name, tensor in self._tensors.items()
            if tensor.is_floating_point()
        }

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


class _SafeTensorFiles:
    """The tensors of one safetensors file, or of several that share out the weights."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._file_of: dict[str, SafeTensors] = {}
        for path in paths:
            file = open_safetensors(path)
            self._file_of |= dict.fromkeys(file.keys(), file)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        slices = {name: file.get_slice(name) for name, file in self._file_of.items()}
        return {
            name: tuple(entry.get_shape())
            for name, entry in slices.items()
            # Counters of BatchNorm are integers, and no network needs them.
            if entry.get_dtype().startswith(("F", "BF"))
        }

    def tensor(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)


class WeightsReader:
    """Ranges of parameters from a weights file, under our names and in our shapes.

    The file stores one kind of values, so the ``kind`` of ``read`` is ignored.

    Attributes:
        shapes: shape of each parameter.
        published: whether the file has the published names.
        entry: the entry of a torch file that is read.
        entries: all its entries.
        image_size: that a torch file states (pixels).
        stand_ins: names in a torch file that were not executed.
        prefix: start of every name in the file, which ours do not have.

    Raises:
        CheckpointError: the file cannot be read, or has no such entry.
    """

    def __init__(self, path: Path, entry: str = "") -> None:
        self.entry = ""
        self.entries: list[str] = []
        self.stand_ins: list[str] = []
        self.image_size: int | None = None
        stored = self._open(path, entry)
        shapes = stored.shapes()
        self.prefix = _common_prefix(shapes)
        # Three names per tensor: in the file, without prefix, and ours.
        bare = {name.removeprefix(self.prefix): name for name in shapes}
        self.published = are_published(bare)
        renamed = our_names(bare) if self.published else {name: name for name in bare}
        self._stored = stored
        self._stored_names = {ours: bare[name] for name, ours in renamed.items()}
        self.shapes: dict[str, list[int]] = {
            ours: list(our_shape(name, shapes[bare[name]])) for name, ours in renamed.items()
        }

    def read(self, kind: str, name: str, offset: int, length: int) -> Tensor:
        """Elements [offset, offset + length) of the flattened parameter: fp32, shape (length,)."""
        return self.full(name).reshape(-1)[offset : offset + length]

    def full(self, name: str) -> Tensor:
        """The whole parameter, fp32."""
        tensor = self._stored.tensor(self._stored_names[name])
        # In fp32, whatever the file has: the master weights of every stage are.
        return tensor.float().reshape(self.shapes[name])

    def _open(self, path: Path, entry: str) -> _Stored:
        if str(path).endswith(TORCH_SUFFIXES):
            return self._open_torch_file(path, entry)
        try:
            return _SafeTensorFiles(_shards(path) if path.name == SHARDED_WEIGHTS else [path])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot be read ({error})",
                place=str(path),
                remedy="rerun the stage that writes it, or copy the file again",
            ) from error

    def _open_torch_file(self, path: Path, entry: str) -> _Stored:
        file = read_torch_file(path)
        self.entries = list(file.state_dicts)
        self.entry = entry or self.entries[0]
        self.stand_ins = file.stand_ins
        self.image_size = file.image_size
        if self.entry not in file.state_dicts:
            known = [f"{path}#{name}" for name in self.entries if name != WHOLE]
            raise CheckpointError(
                f"has no weights under '{entry}'",
                place=str(path),
                remedy=f"name {' or '.join(known) or path}",
            )
        return _TorchTensors(file.state_dicts[self.entry])


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    files = json.loads(index.read_text())["weight_map"].values()
    return [index.with_name(name) for name in dict.fromkeys(files)]


def _common_prefix(names: Iterable[str]) -> str:
    """The prefixes of wrappers that all names begin with, such as "module._orig_mod."."""
    prefix = ""
    while wrapper := next(
        (
            wrapper
            for wrapper in _PREFIXES
            if names and all(name.startswith(prefix + wrapper) for name in names)
        ),
        "",
    ):
        prefix += wrapper
    return prefix
