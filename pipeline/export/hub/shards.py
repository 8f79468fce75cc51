"""Writes weights as safetensors: one file, or several and an index where they are large."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pipeline.checkpoint.weights_file import write_weights_file
from pipeline.files import write_json
from pipeline.layout import MODEL_WEIGHTS, SHARDED_WEIGHTS

SHARD_BYTES = 5_000_000_000  # of one file, as on the Hugging Face hub
_LABELS = {"format": "pt"}  # transformers asks for it


def write_sharded(folder: Path, state: Mapping[str, Tensor]) -> list[Path]:
    """Write the weights; files of an earlier export with another number of files are removed.

    Returns:
        the files, without the index.

    Raises:
        OSError, SafetensorError: a file cannot be written.
    """
    shards = _divide(state)
    names = [MODEL_WEIGHTS]
    if len(shards) > 1:
        stem = Path(MODEL_WEIGHTS).stem
        count = len(shards)
        names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        # Copies: loaded weights are views of one mapped file, which would count as shared memory.
        tensors = {key: state[key].detach().clone().contiguous() for key in shard}
        write_weights_file(folder / name, tensors, metadata=_LABELS)
    # An index beside a single file, or one file beside several, would be read first.
    for path in folder.glob(f"{Path(MODEL_WEIGHTS).stem}*.safetensors"):
        if path.name not in names:
            path.unlink()
    index = folder / SHARDED_WEIGHTS
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(_bytes(value) for value in state.values())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        index.unlink(missing_ok=True)
    return [folder / name for name in names]


def _divide(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names in runs of at most SHARD_BYTES; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, value in state.items():
        # In the order of the network, so that a part of it lies in one file.
        if shards[-1] and size + _bytes(value) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(value)
    return shards


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
