"""Writing a checkpoint: every rank its own file, rank 0 the manifest and the rename that makes it exist."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from pipeline.checkpoint.manifest import Manifest, Piece, directory_of, keep_newest
from pipeline.errors import CheckpointError
from pipeline.files import file_digest, fsync_dir, write_json, write_with

Owned = tuple[str, tuple[int, ...], int, str, Tensor]  # name, global shape, offset, kind, values (1-D)


def save(
    root: Path, step: int, owned: Iterable[Owned], state: dict[str, Any], *, keep: int, may_commit: Callable[[], bool]
) -> Path | None:
    """Write the checkpoint of ``step``; collective over all ranks.

    Args:
        owned: this rank's ranges of parameters.
        state: of the training loop (JSON-able), the same on every rank.
        may_commit: asked on rank 0 right before the rename; a group of processes that has been replaced may not.

    Returns:
        The directory, or None where the commit was refused or the disk had no room (training can go on; the previous
        checkpoint stays the newest).
    """
    rank, target = dist.get_rank(), directory_of(root, step)
    temporary = target.with_name(f".{target.name}.tmp")
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    report: dict[str, Any] | str
    try:
        report = _write_share(temporary, f"rank-{rank:05d}.safetensors", owned)
    except OSError as error:
        report = f"rank {rank}: {error}"
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    failures = [entry for entry in reports if isinstance(entry, str)]
    committed = [False]
    if rank == 0 and not failures:
        committed = [_commit(temporary, target, step, reports, state, may_commit)]
        if committed[0]:
            keep_newest(root, keep)
    elif rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    dist.broadcast_object_list(committed, src=0)
    return target if committed[0] else None


def _write_share(directory: Path, name: str, owned: Iterable[Owned]) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    pieces: dict[tuple[str, int], Piece] = {}
    shapes: dict[str, list[int]] = {}
    kinds: dict[str, None] = {}
    for parameter, shape, offset, kind, values in owned:
        tensors[f"{kind}|{parameter}"] = values.detach().to("cpu", torch.float32).contiguous().clone()
        pieces[parameter, offset] = Piece(parameter, offset, values.numel(), name)
        shapes[parameter], kinds[kind] = list(shape), None
    if not tensors:
        return {"pieces": [], "shapes": {}, "kinds": [], "files": {}}
    path = directory / name
    write_with(path, lambda temporary: save_file(tensors, temporary))
    file = {"bytes": path.stat().st_size, "xxh3": file_digest(path)}
    return {"pieces": list(pieces.values()), "shapes": shapes, "kinds": list(kinds), "files": {name: file}}


def _commit(
    temporary: Path, target: Path, step: int, reports: list[Any], state: dict[str, Any], may_commit: Callable[[], bool]
) -> bool:
    shapes = {name: shape for report in reports for name, shape in report["shapes"].items()}
    files = {name: file for report in reports for name, file in report["files"].items()}
    kinds = next(report["kinds"] for report in reports if report["kinds"])
    pieces = [piece for report in reports for piece in report["pieces"]]
    _check_complete(shapes, pieces)
    write_json(temporary / "manifest.json", Manifest(step, shapes, kinds, pieces, files, state).to_json())
    if not may_commit():
        shutil.rmtree(temporary, ignore_errors=True)
        return False
    if target.exists():  # the same step again, after an interrupted attempt: the newer one replaces it
        shutil.rmtree(target)
    os.rename(temporary, target)
    fsync_dir(target.parent)
    return True


def _check_complete(shapes: dict[str, list[int]], pieces: list[Piece]) -> None:
    covered = dict.fromkeys(shapes, 0)
    for piece in pieces:
        covered[piece.name] += piece.length
    for name, shape in shapes.items():
        if covered[name] != torch.Size(shape).numel():
            raise CheckpointError(f"ranks own {covered[name]} of {torch.Size(shape).numel()} elements of {name}")
