"""Saving and restoring a training stage.

The weights at the start of a stage come from the first of these that exists:

1. the newest valid checkpoint of the stage itself;
2. the weights of the stage or file that it starts `from`;
3. random initialisation from the seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.checkpoint.architecture import last_classifier
from pipeline.checkpoint.manifest import Manifest, list_checkpoints, remove_leftovers, set_aside
from pipeline.checkpoint.rank_file import Owned
from pipeline.checkpoint.reader import CheckpointReader, RangeReader
from pipeline.checkpoint.weights import backbone_names
from pipeline.errors import CheckpointError
from pipeline.model import NetworkSpec
from pipeline.reporting import Log
from pipeline.train.training_state import TrainingState
from pipeline.train.zero_state import REPLICATED, ShardedState


@dataclass(frozen=True)
class Restored:
    """The checkpoint that a stage resumes from: steps done and the state of the training loop."""

    step: int
    state: TrainingState


def owned_ranges(sharded: ShardedState) -> Iterator[Owned]:
    """What this rank writes into a checkpoint: its share of weights, moments and EMA."""
    # Each rank writes what it owns. Of replicated tensors one copy is enough: rank 0 writes it.
    # Under ZeRO 0 everything is replicated.
    for fragment, kind, values in sharded.tensors():
        if dist.get_rank() == 0 or (sharded.zero_stage > 0 and fragment.flat != REPLICATED):
            yield fragment.name, fragment.shape, fragment.offset, kind, values


def restore(
    root: Path,
    sharded: ShardedState,
    identity: Mapping[str, object],
    log: Log,
    *,
    usable: Callable[[int], bool] = lambda done: True,
) -> Restored | None:
    """Load the newest checkpoint whose checksums match; None if there is no checkpoint. Collective.

    Damaged checkpoints are renamed. All ranks use the same checkpoint.

    Args:
        usable: whether a checkpoint of so many steps counts.

    Raises:
        CheckpointError: the checkpoint belongs to a different run, or none of them can be used.
    """
    refused: dict[Path, str] = {}
    for directory in _list_on_all_ranks(root, usable):
        # 1. Verify. A damaged checkpoint is passed over; the one before it may be intact.
        problem = _verify_on_all_ranks(directory)
        if problem is not None:
            refused[directory] = problem
            continue
        # 2. Check that it belongs to this run, before anything is changed.
        state = TrainingState.from_json(Manifest.read(directory).state)
        _check_identity(state.identity, identity, directory)
        # 3. Rename the damaged ones, now that another one can be used.
        for damaged, reason in refused.items():
            log(f"damaged checkpoint renamed to {damaged.name}.refused: {reason}", "warning")
            if dist.get_rank() == 0:
                set_aside(damaged)
        # 4. Load.
        return load_checkpoint(directory, sharded)
    if refused:
        newest_problem = next(iter(refused.values()))
        raise CheckpointError(
            f"none of the {len(refused)} checkpoints can be used; the newest: {newest_problem}",
            place=str(root),
            remedy="restore an undamaged copy; to train from scratch, rerun the same command with "
            f"--stage {root.name} --force",
        )
    return None


def load_checkpoint(directory: Path, sharded: ShardedState) -> Restored:
    """Load a checkpoint that was verified before: every kind of tensor under its own name."""
    manifest = Manifest.read(directory)
    state = TrainingState.from_json(manifest.state)
    _load(CheckpointReader(directory, manifest), sharded, {kind: kind for kind in manifest.kinds})
    sharded.set_step(state.applied_steps)
    return Restored(manifest.step, state)


def _list_on_all_ranks(root: Path, usable: Callable[[int], bool]) -> list[Path]:
    """The checkpoints that rank 0 finds, newest first, the same list on every rank."""
    # Only rank 0 lists: on a network file system, two ranks may see different folders.
    listed: list[list[Path]] = [[]]
    if dist.get_rank() == 0:
        remove_leftovers(root)
        listed = [[directory for step, directory in list_checkpoints(root) if usable(step)]]
    dist.broadcast_object_list(listed, src=0)
    return listed[0]


def _verify_on_all_ranks(directory: Path) -> str | None:
    """What is wrong with a checkpoint, or None; the same answer on every rank.

    The ranks share the work. Example: of 5 files on 2 ranks, rank 0 verifies files 0, 2 and 4,
    rank 1 verifies files 1 and 3.
    """
    problem: str | None = None
    try:
        manifest = Manifest.read(directory)
        manifest.verify(directory, sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()])
    except (CheckpointError, OSError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((problem for problem in problems if problem is not None), None)


def _check_identity(
    saved: Mapping[str, object], identity: Mapping[str, object], directory: Path
) -> None:
    # Through JSON, as the saved one: tuples become lists. An earlier version may not have recorded
    # a key: it cannot differ then.
    current = json.loads(json.dumps(identity))
    differences = [
        f"{key}: saved {saved[key]}, now {value}"
        for key, value in current.items()
        if key in saved and _with_defaults(saved[key]) != _with_defaults(value)
    ]
    if differences:
        raise CheckpointError(
            f"checkpoint belongs to a different run ({'; '.join(differences)})",
            place=str(directory),
            remedy="restore the settings, or give the job another name (--set name=NAME); to train "
            f"from scratch, rerun the same command with --stage {directory.parent.name} --force",
        )


def _with_defaults(value: object) -> object:
    """A recorded network without the fields at their default; any other value unchanged.

    A network that was saved before a field of NetworkSpec existed has its default.
    """
    if not isinstance(value, dict):
        return value
    defaults = {entry.name: entry.default for entry in fields(NetworkSpec)}
    return {
        key: entry for key, entry in value.items() if key in defaults and entry != defaults[key]
    }


def load_initial(
    source: RangeReader,
    sharded: ShardedState,
    place: str,
    log: Log,
    *,
    with_classifier: bool = False,
) -> None:
    """Start from the backbone of given weights; heads keep their random initialisation.

    Args:
        with_classifier: the weights are of the same classes: their last classifier becomes that of
            the network.

    Raises:
        CheckpointError: on all ranks, if the weights do not fit the network.
    """
    names = {name: name for name in backbone_names(source, sharded.shapes, place)}
    head = last_classifier(source.shapes)
    if with_classifier and head:
        own_head = last_classifier(sharded.shapes)
        names |= {
            f"{own_head}{name.removeprefix(head)}": name
            for name in source.shapes
            if name.startswith(head)
        }
    _load(source, sharded, {}, names)
    _require_finite(sharded, place)
    new = len(sharded.shapes) - len(names)
    dropped = "" if with_classifier or not head else "; its classifier is not used"
    log(
        f"loaded {len(names)} parameters from {place}; {new} parameters of the heads are new"
        f"{dropped}"
    )


def _require_finite(sharded: ShardedState, place: str) -> None:
    """Raise a CheckpointError on all ranks if a weight is not finite: no step could be applied."""
    bad = [
        fragment.name
        for fragment, kind, values in sharded.tensors()
        if kind == "master" and not bool(values.isfinite().all())
    ]
    names: list[list[str]] = [bad] * dist.get_world_size()
    dist.all_gather_object(names, bad)
    first = next((name for rank in names for name in rank), None)
    if first is not None:
        raise CheckpointError(
            f"weight {first} is not finite",
            place=place,
            remedy="start from other weights: the training that wrote these has diverged",
        )


@torch.no_grad()
def _load(
    source: RangeReader,
    sharded: ShardedState,
    stored_kinds: dict[str, str],
    names: dict[str, str] | None = None,
) -> None:
    """Fill this rank's share of weights, moments and EMA from ``source``.

    Args:
        stored_kinds: our kind -> the name of the kind in ``source``. Moments that are not in it
            stay zero. An EMA that is not in it (turned on later, or a weights file) starts from
            the weights.
        names: parameters to load, with their names in ``source``; None: all.
    """
    for fragment, kind, values in sharded.tensors():
        wanted = names is None or fragment.name in names
        if wanted and (kind in stored_kinds or kind in ("master", "ema")):
            stored_kind = stored_kinds.get(kind, "master")
            name = fragment.name if names is None else names[fragment.name]
            values.copy_(source.read(stored_kind, name, fragment.offset, fragment.length))
    sharded.copy_to_model(sharded.flats)
