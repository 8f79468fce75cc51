"""Writing a checkpoint: every rank its own file, rank 0 the manifest and the rename that makes it exist."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline.checkpoint.manifest import Manifest, TensorSlice, directory_of, keep_newest
from pipeline.errors import CheckpointError, StageError
from pipeline.files import file_digest, fsync_dir, write_json, write_with

Owned = tuple[
    str, tuple[int, ...], int, str, Tensor
]  # name, global shape, offset, kind, values (1-D)
WRITE_ERRORS = (OSError, SafetensorError)  # safetensors reports a full disk as an error of its own


def save(
    root: Path,
    step: int,
    owned: Iterable[Owned],
    state: dict[str, Any],
    *,
    keep: int,
    may_commit: Callable[[], bool],
) -> str | None:
    """Write the checkpoint of ``step``; collective over all ranks.

    Args:
        owned: this rank's ranges of parameters.
        state: of the training loop (JSON-able), the same on every rank.
        may_commit: asked on rank 0 right before the rename.

    Returns:
        None where the checkpoint is there now; else why it could not be written, such as a full disk (training can go on,
        the checkpoint before stays the newest).

    Raises:
        StageError: on rank 0, when this group of processes has been replaced by a newer one and may not commit.
    """
    target, writer = directory_of(root, step), [os.getpid()]
    dist.broadcast_object_list(
        writer, src=0
    )  # a replaced group that lives on for a while writes elsewhere
    temporary = target.with_name(f".{target.name}.{writer[0]}.tmp")
    failure = _on_main(lambda: _make_empty(temporary))
    if failure is not None:
        return failure
    rank = dist.get_rank()
    report: dict[str, Any] | str
    try:
        report = _write_share(temporary, f"rank-{rank:05d}.safetensors", owned)
    except WRITE_ERRORS as error:
        report = f"rank {rank}: {error}"
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    failure = next((entry for entry in reports if isinstance(entry, str)), None)
    if failure is None:
        failure = _on_main(lambda: _commit(temporary, target, step, reports, state, may_commit))
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        if failure is None:
            with contextlib.suppress(
                OSError
            ):  # costs room only, and is tried again after the next one
                keep_newest(root, keep)
    return failure


def _on_main(action: Callable[[], None]) -> str | None:
    """Do it on rank 0; every rank learns why it failed, if it did."""
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except WRITE_ERRORS as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    return failure[0]


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _write_share(directory: Path, name: str, owned: Iterable[Owned]) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    pieces: dict[tuple[str, int], TensorSlice] = {}
    shapes: dict[str, list[int]] = {}
    kinds: dict[str, None] = {}
    for parameter, shape, offset, kind, values in owned:
        tensors[f"{kind}|{parameter}"] = values.detach().to("cpu", torch.float32, copy=True)
        pieces[parameter, offset] = TensorSlice(parameter, offset, values.numel(), name)
        shapes[parameter], kinds[kind] = list(shape), None
    if not tensors:
        return {"pieces": [], "shapes": {}, "kinds": [], "files": {}}
    path = directory / name
    write_with(path, lambda temporary: save_file(tensors, temporary))
    file = {"bytes": path.stat().st_size, "xxh3": file_digest(path)}
    return {
        "pieces": list(pieces.values()),
        "shapes": shapes,
        "kinds": list(kinds),
        "files": {name: file},
    }


def _commit(
    temporary: Path,
    target: Path,
    step: int,
    reports: list[Any],
    state: dict[str, Any],
    may_commit: Callable[[], bool],
) -> None:
    shapes = {name: shape for report in reports for name, shape in report["shapes"].items()}
    files = {name: file for report in reports for name, file in report["files"].items()}
    kinds = next(report["kinds"] for report in reports if report["kinds"])
    pieces = [piece for report in reports for piece in report["pieces"]]
    _check_complete(shapes, pieces)
    write_json(
        temporary / "manifest.json", Manifest(step, shapes, kinds, pieces, files, state).to_json()
    )
    if not may_commit():
        shutil.rmtree(temporary, ignore_errors=True)
        raise StageError(
            "a newer group of processes has taken over; this one ends without a checkpoint",
            place=str(target),
            remedy="nothing to do: the newer group goes on",
        )
    os.rename(temporary, target)
    fsync_dir(target.parent)


def _check_complete(shapes: dict[str, list[int]], pieces: list[TensorSlice]) -> None:
    covered = dict.fromkeys(shapes, 0)
    for piece in pieces:
        covered[piece.name] += piece.length
    for name, shape in shapes.items():
        if covered[name] != torch.Size(shape).numel():
            raise CheckpointError(
                f"ranks own {covered[name]} of {torch.Size(shape).numel()} elements of {name}"
            )
