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

from pipeline.checkpoint.manifest import Manifest, list_checkpoints, remove_leftovers
from pipeline.checkpoint.reader import CheckpointReader, RangeReader
from pipeline.checkpoint.writer import save
from pipeline.errors import CheckpointError
from pipeline.files import write_json, write_with
from pipeline.model import NetworkSpec
from pipeline.train.build import loadable
from pipeline.train.masters import Masters

Say = Callable[[str], None]


def save_checkpoint(
    root: Path, masters: Masters, step: int, state: dict[str, Any], keep: int, may_commit: Callable[[], bool]
) -> Path | None:
    """Collective: masters, moments and EMA of every rank, and the loop's state."""
    owned = (
        (fragment.name, fragment.shape, fragment.offset, kind, values) for fragment, kind, values in masters.tensors()
        if masters.stage > 0 or dist.get_rank() == 0  # stage 0 replicates: one copy is enough
    )  # fmt: skip
    return save(root, step, owned, state, keep=keep, may_commit=may_commit)


def restore(root: Path, masters: Masters, identity: dict[str, Any], say: Say) -> Manifest | None:
    """Load the newest checkpoint that verifies, on all ranks alike; None where there is none."""
    if dist.get_rank() == 0:
        remove_leftovers(root)
    dist.barrier()
    for _, directory in list_checkpoints(root):
        try:
            manifest: Manifest | None = _verified(directory)
        except CheckpointError as error:
            manifest = None
            say(f"checkpoint refused: {error}")
        valid = torch.tensor(1 if manifest else 0)
        dist.all_reduce(valid, op=dist.ReduceOp.MIN)
        if manifest is not None and valid.item():
            _check_identity(manifest.state["identity"], identity, directory)
            _load(CheckpointReader(directory, manifest), masters, {kind: kind for kind in manifest.kinds})
            masters.set_step(manifest.state["optimizer_steps"])
            return manifest
    return None


def _verified(directory: Path) -> Manifest:
    manifest = Manifest.read(directory)
    names = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]  # each rank checks its share
    manifest.verify(directory, names)
    return manifest


def _check_identity(saved: dict[str, Any], now: dict[str, Any], directory: Path) -> None:
    now = json.loads(json.dumps(now))
    different = [f"{key}: {saved.get(key)} there, {now.get(key)} now" for key in now if saved.get(key) != now.get(key)]
    if different:
        raise CheckpointError(
            "checkpoint is of another run: " + "; ".join(different),
            place=str(directory),
            remedy="use another job name (a new run directory), or restore the settings",
        )


def load_initial(source: RangeReader, masters: Masters, place: str, say: Say) -> None:
    """Start from given weights; heads of another shape or kind stay as initialised, which is said."""
    shapes = {fragment.name: fragment.shape for fragment in masters.fragments}
    names, fresh = loadable(source, shapes, place)
    _load(source, masters, {"master": "master", "ema": "master"}, set(names))
    say(f"loaded {len(names)} parameters from {place}; new on this rank: {len(fresh)} (heads)")


@torch.no_grad()
def _load(source: RangeReader, masters: Masters, kinds: dict[str, str], names: set[str] | None = None) -> None:
    """``kinds``: of ours -> of the source. What the source lacks (an EMA turned on later) starts from the masters."""
    for fragment, kind, values in masters.tensors():
        if names is None or fragment.name in names:
            stored = kinds.get(kind, "master")
            values.copy_(source.read(stored, fragment.name, fragment.offset, fragment.length))
    masters.publish(masters.flats)


def write_weights(directory: Path, checkpoint: Path, spec: NetworkSpec, facts: dict[str, Any]) -> None:
    """The stage's result: whole fp32 weights (the EMA where there is one) and what they are."""
    manifest = Manifest.read(checkpoint)
    reader = CheckpointReader(checkpoint, manifest)
    kind = "ema" if "ema" in manifest.kinds else "master"
    tensors = {name: reader.full(kind, name) for name in sorted(manifest.shapes)}
    write_with(directory / "weights.safetensors", lambda path: save_file(tensors, path))
    write_json(directory / "weights.json", {"network": asdict(spec), "weights": kind, "step": manifest.step, **facts})
