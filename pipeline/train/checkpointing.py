"""Saving and restoring a training stage.

The weights at the start of a stage come from the first of these that exists:

1. the newest valid checkpoint of the stage itself;
2. the weights of the stage or file that it starts `from`;
3. random initialisation from the seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.checkpoint.architecture import last_classifier
from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.manifest import Manifest, list_checkpoints, remove_leftovers, set_aside
from pipeline.checkpoint.reader import CheckpointReader, RangeReader
from pipeline.checkpoint.weights import backbone_names
from pipeline.checkpoint.weights_file import write_weights_file
from pipeline.checkpoint.writer import WRITE_ERRORS, save
from pipeline.errors import CheckpointError
from pipeline.layout import WEIGHTS_FILE
from pipeline.model import NetworkSpec
from pipeline.reporting import Log
from pipeline.train.training_state import TrainingState
from pipeline.train.zero_state import BEST, REPLICATED, ShardedState


@dataclass(frozen=True)
class Restored:
    """The checkpoint that a stage resumes from: steps done and the state of the training loop."""

    step: int
    state: TrainingState


def save_checkpoint(
    root: Path,
    sharded: ShardedState,
    step: int,
    state: TrainingState,
    *,
    keep: int,
    may_commit: Callable[[], bool],
) -> str | None:
    """Write the checkpoint of ``step``: weights, moments and EMA of every rank. Collective.

    Returns:
        None, or why the checkpoint could not be written.

    Raises:
        StageError: on rank 0, if ``may_commit`` refuses.
    """
    # Each rank writes what it owns. Of replicated tensors one copy is enough: rank 0 writes it.
    # Under ZeRO 0 everything is replicated.
    owned = (
        (fragment.name, fragment.shape, fragment.offset, kind, values)
        for fragment, kind, values in sharded.tensors()
        if dist.get_rank() == 0 or (sharded.zero_stage > 0 and fragment.flat != REPLICATED)
    )
    return save(root, step, owned, state.to_json(), keep=keep, may_commit=may_commit)


def restore(
    root: Path, sharded: ShardedState, identity: Mapping[str, object], log: Log
) -> Restored | None:
    """Load the newest checkpoint whose checksums match; None if there is no checkpoint. Collective.

    Damaged checkpoints are renamed. All ranks use the same checkpoint.

    Raises:
        CheckpointError: the checkpoint belongs to a different run, or none of them can be used.
    """
    refused: dict[Path, str] = {}
    for directory in _list_on_all_ranks(root):
        # 1. Verify. A damaged checkpoint is passed over; the one before it may be intact.
        problem = _verify_on_all_ranks(directory)
        if problem is not None:
            refused[directory] = problem
            continue
        # 2. Check that it belongs to this run, before anything is changed.
        manifest = Manifest.read(directory)
        state = TrainingState.from_json(manifest.state)
        _check_identity(state.identity, identity, directory)
        # 3. Rename the damaged ones, now that another one can be used.
        for damaged, reason in refused.items():
            log(f"damaged checkpoint renamed to {damaged.name}.refused: {reason}", "warning")
            if dist.get_rank() == 0:
                set_aside(damaged)
        # 4. Load every kind of tensor under its own name.
        _load(
            CheckpointReader(directory, manifest), sharded, {kind: kind for kind in manifest.kinds}
        )
        sharded.set_step(state.applied_steps)
        return Restored(manifest.step, state)
    if refused:
        newest_problem = next(iter(refused.values()))
        raise CheckpointError(
            f"none of the {len(refused)} checkpoints can be used; the newest: {newest_problem}",
            place=str(root),
            remedy="restore an undamaged copy; to train from scratch, rerun the same command with "
            f"--stage {root.name} --force",
        )
    return None


def _list_on_all_ranks(root: Path) -> list[Path]:
    """The checkpoints that rank 0 finds, newest first, the same list on every rank."""
    # Only rank 0 lists: on a network file system, two ranks may see different folders.
    listed: list[list[Path]] = [[]]
    if dist.get_rank() == 0:
        remove_leftovers(root)
        listed = [[directory for _, directory in list_checkpoints(root)]]
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
    # Every rank reads its own share, and all of them have to raise.
    are_finite = all(bool(values.isfinite().all()) for *_, values in sharded.tensors())
    gathered = [are_finite] * dist.get_world_size()
    dist.all_gather_object(gathered, are_finite)
    if not all(gathered):
        raise _not_finite(place)
    new = len(sharded.shapes) - len(names)
    dropped = "" if with_classifier or not head else "; its classifier is not used"
    log(
        f"loaded {len(names)} parameters from {place}; {new} parameters of the heads are new"
        f"{dropped}"
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


def write_weights(
    directory: Path, checkpoint: Path, spec: NetworkSpec, description: WeightsDescription
) -> None:
    """Write the result of a stage: complete fp32 weights and their description. Collective.

    The values are the best ones of the checkpoint if ``description.keep`` says so. Otherwise they
    are its EMA, or the weights themselves if it has none. Rank 0 writes. ``description`` is
    completed with what the checkpoint knows.

    Raises:
        CheckpointError: on all ranks, if they cannot be written.
    """
    failure: list[CheckpointError | None] = [None]
    if dist.get_rank() == 0:
        try:
            _write_weights(directory, checkpoint, spec, description)
        except CheckpointError as error:
            failure = [error]
        except WRITE_ERRORS as error:
            failure = [
                CheckpointError(
                    f"the weights cannot be written: {error}",
                    place=str(directory),
                    remedy="free some disk space, then rerun the same command: it trains no step "
                    "a second time",
                )
            ]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


def _write_weights(
    directory: Path, checkpoint: Path, spec: NetworkSpec, description: WeightsDescription
) -> None:
    manifest = Manifest.read(checkpoint)
    reader = CheckpointReader(checkpoint, manifest)
    kind = "ema" if "ema" in manifest.kinds else "master"
    stored_kind = BEST if description.keep == "best" else kind
    tensors = {name: reader.full(stored_kind, name) for name in sorted(manifest.shapes)}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise _not_finite(str(checkpoint))
    write_weights_file(directory / WEIGHTS_FILE, tensors)
    replace(description, network=asdict(spec), weights=kind).write(directory)


def _not_finite(place: str) -> CheckpointError:
    return CheckpointError(
        "holds weights that are not finite: their training has diverged",
        place=place,
        remedy="train them again with a lower learning rate, or take other weights",
    )
