"""Saving and restoring a training stage.

Precedence at the start of a stage: 1. its own newest valid checkpoint, 2. the weights of the stage it starts `from`,
3. fresh weights from the seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pipeline.checkpoint.manifest import Manifest, list_checkpoints, remove_leftovers, set_aside
from pipeline.checkpoint.reader import CheckpointReader, RangeReader
from pipeline.checkpoint.weights import loadable
from pipeline.checkpoint.writer import WRITE_ERRORS, save
from pipeline.errors import CheckpointError
from pipeline.files import write_json, write_with
from pipeline.layout import WEIGHTS_FILE, WEIGHTS_JSON
from pipeline.model import NetworkSpec
from pipeline.reporting import Log
from pipeline.train.zero_state import ShardedState


def save_checkpoint(
    root: Path,
    masters: ShardedState,
    step: int,
    state: dict[str, Any],
    keep: int,
    may_commit: Callable[[], bool],
) -> str | None:
    """Collective: masters, moments and EMA of every rank, and the loop's state. Returns why it failed, None if it did not."""
    masters.average_buffers()
    owned = (
        (fragment.name, fragment.shape, fragment.offset, kind, values)
        for fragment, kind, values in masters.tensors()
        if (masters.stage > 0 and fragment.flat >= 0)
        or dist.get_rank() == 0  # of what is replicated one copy is enough
    )
    return save(root, step, owned, state, keep=keep, may_commit=may_commit)


def restore(
    root: Path, masters: ShardedState, identity: dict[str, Any], log: Log
) -> Manifest | None:
    """Load the newest checkpoint that verifies, on all ranks alike; None where there is none. Damaged ones are set aside.

    Raises:
        CheckpointError: the checkpoint is of another run, or there are checkpoints and none can be used.
    """
    refused: dict[Path, str] = {}
    for directory in _listed(root):
        problem = _problem(directory)
        if problem is not None:
            refused[directory] = problem
            continue
        manifest = Manifest.read(directory)
        _check_identity(manifest.state["identity"], identity, directory)
        for damaged, reason in refused.items():
            log(f"checkpoint refused, and set aside as {damaged.name}.refused: {reason}", "warning")
            if dist.get_rank() == 0:
                set_aside(damaged)
        _load(
            CheckpointReader(directory, manifest), masters, {kind: kind for kind in manifest.kinds}
        )
        masters.set_step(manifest.state["optimizer_steps"])
        return manifest
    if refused:
        raise CheckpointError(
            f"none of the {len(refused)} checkpoints can be used; the newest: {next(iter(refused.values()))}",
            place=str(root),
            remedy="put an undamaged copy back, or move this folder away to begin the stage anew",
        )
    return None


def _listed(root: Path) -> list[Path]:
    """The checkpoints as rank 0 sees them, newest first, the same on every rank."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        remove_leftovers(root)
        found = [[directory for _, directory in list_checkpoints(root)]]
    dist.broadcast_object_list(found, src=0)
    directories: list[Path] = found[0]
    return directories


def _problem(directory: Path) -> str | None:
    """What is wrong with a checkpoint, if anything: each rank checks its share of the files, all get to know."""
    mine: str | None = None
    try:
        manifest = Manifest.read(directory)
        manifest.verify(directory, sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()])
    except (CheckpointError, OSError) as error:
        mine = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, mine)
    return next((problem for problem in problems if problem is not None), None)


def _check_identity(saved: dict[str, Any], now: dict[str, Any], directory: Path) -> None:
    now = json.loads(json.dumps(now))
    different = [
        f"{key}: {saved.get(key)} there, {now.get(key)} now"
        for key in now
        if saved.get(key) != now.get(key)
    ]
    if different:
        raise CheckpointError(
            "checkpoint is of another run: " + "; ".join(different),
            place=str(directory),
            remedy="use another job name (a new run directory), or restore the settings",
        )


def load_initial(source: RangeReader, masters: ShardedState, place: str, log: Log) -> None:
    """Start from the backbone of given weights; heads stay as initialised. Raises CheckpointError, on all ranks alike."""
    names = loadable(source, masters.shapes, place)
    _load(source, masters, {}, set(names))
    log(
        f"loaded {len(names)} parameters from {place}; {len(masters.shapes) - len(names)} of the heads are new"
    )


@torch.no_grad()
def _load(
    source: RangeReader,
    masters: ShardedState,
    stored: dict[str, str],
    names: set[str] | None = None,
) -> None:
    """ShardedState, moments and EMA from what the source calls them (``stored``). Where it has no moments, they stay zero; where
    it has no EMA (turned on later), the average starts from the masters."""
    for fragment, kind, values in masters.tensors():
        if (names is None or fragment.name in names) and (
            kind in stored or kind in ("master", "ema")
        ):
            values.copy_(
                source.read(
                    stored.get(kind, "master"), fragment.name, fragment.offset, fragment.length
                )
            )
    masters.publish(masters.flats)


def write_weights(
    directory: Path, checkpoint: Path, spec: NetworkSpec, facts: dict[str, Any]
) -> None:
    """The stage's result: whole fp32 weights (the EMA where there is one) and what they are. Collective: rank 0 writes.

    Raises:
        CheckpointError: on all ranks, if they cannot be written.
    """
    failure: list[CheckpointError | None] = [None]
    if dist.get_rank() == 0:
        try:
            _write_weights(directory, checkpoint, spec, facts)
        except CheckpointError as error:
            failure = [error]
        except WRITE_ERRORS as error:
            remedy = "make room, then run the same command again: nothing is trained a second time"
            failure = [
                CheckpointError(
                    f"the weights cannot be written: {error}", place=str(directory), remedy=remedy
                )
            ]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


def _write_weights(
    directory: Path, checkpoint: Path, spec: NetworkSpec, facts: dict[str, Any]
) -> None:
    manifest = Manifest.read(checkpoint)
    reader = CheckpointReader(checkpoint, manifest)
    kind = "ema" if "ema" in manifest.kinds else "master"
    tensors = {name: reader.full(kind, name) for name in sorted(manifest.shapes)}
    write_with(directory / WEIGHTS_FILE, lambda path: save_file(tensors, path))
    write_json(
        directory / WEIGHTS_JSON,
        {"network": asdict(spec), "weights": kind, "step": manifest.step, **facts},
    )
