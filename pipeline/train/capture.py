"""The record of a bad step: which images it had, and where its numbers first were not finite.

The state before the step lies beside it as a checkpoint (`CheckpointSaver.capture`); the command
``replay`` computes the step again from both.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.checkpoint.manifest import directory_of
from pipeline.data.loader import TrainLoader
from pipeline.errors import CheckpointError
from pipeline.files import matches_digest, with_digest, write_json
from pipeline.train.context import StageContext
from pipeline.train.step import TrainingStep

IMAGES = "the images"  # in place of a module's name


@dataclass(frozen=True, kw_only=True)
class MicroBatchRecord:
    """A micro-batch of a bad step, computed again on the same rank.

    ``samples``: rows of the training split. ``loss``: None if it is not finite. ``origin``: the
    first module whose output is not finite, ``IMAGES``, or '' if the whole forward pass is finite.
    """

    rank: int
    host: str
    epoch: int
    samples: list[int]
    loss: float | None
    origin: str


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """A bad step. ``step`` counts from 1; ``data_step`` (0-based) is its place in the data."""

    step: int
    data_step: int
    reason: str
    seed: int
    world_size: int
    micro_batches: list[MicroBatchRecord]

    @classmethod
    def read(cls, path: Path) -> BadStep | None:
        """Read a record; None if there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            values = json.loads(path.read_text())
            if not matches_digest(values):
                raise ValueError("checksum mismatch: it changed after it was written")
            values.pop("digest", None)
            parts = [MicroBatchRecord(**part) for part in values.pop("micro_batches")]
            return cls(micro_batches=parts, **values)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"is no record of a step ({error})",
                place=str(path),
                remedy="delete it: the step is replayed without it",
            ) from None


def record_path(context: StageContext, step: int) -> Path:
    """Where the record of a step (0-based) lies: beside the state before it."""
    return directory_of(context.run_dir.captures(context.stage), step).with_suffix(".json")


def write_record(
    context: StageContext, step: TrainingStep, loader: TrainLoader, number: int
) -> None:
    """Compute the micro-batches of step ``number`` (0-based) again and record them. Collective.

    Leaves weights, statistics and gradients as they are; the loader has to be rewound.
    """
    # After images were left out, steps and their data have different numbers.
    guard = step.context.guard
    data_step = number + guard.state.shift
    own = examine(step, loader, data_step)
    parts: list[list[MicroBatchRecord]] = [own] * context.dist_env.size
    # Every rank has seen other images; the record names those of all.
    dist.all_gather_object(parts, own)
    if not context.dist_env.is_main:
        return
    record = BadStep(
        step=number + 1,
        data_step=data_step,
        reason=guard.reason,
        seed=context.job.seed,
        world_size=context.dist_env.size,
        micro_batches=[part for rank in parts for part in rank],
    )
    path = record_path(context, number)
    try:
        write_json(path, with_digest(asdict(record)))
    except OSError as error:
        step.context.log(f"the record of step {number + 1} cannot be written: {error}", "warning")
        return
    origins = {part.origin for part in record.micro_batches if part.origin}
    where = f"; first not finite: {', '.join(sorted(origins))}" if origins else ""
    step.context.log(f"step {number + 1} recorded in {path}{where}", "warning")


@torch.no_grad()
def examine(step: TrainingStep, loader: TrainLoader, data_step: int) -> list[MicroBatchRecord]:
    """Run the forward passes of a step again and find where they are not finite. Collective."""
    context = step.context
    # Forward passes update the running statistics of BatchNorm: they are put back at the end.
    statistics = [buffer.clone() for buffer in context.running_statistics()]
    batches = loader.rewind(data_step)
    records = []
    for _ in range(step.accumulation):
        batch = next(batches).to(context.device)
        with first_nonfinite(context.network) as origins:
            inputs = context.augment(batch)
            # Before the first module: images that are not finite are no fault of the network.
            if not _is_finite(inputs.images):
                origins.append(IMAGES)
            output = context.engine(inputs.images, context.drop_path_draws(batch))
            loss = float(context.loss(output, inputs).total)
        records.append(
            MicroBatchRecord(
                rank=dist.get_rank(),
                host=socket.gethostname(),
                epoch=batch.epoch,
                samples=batch.samples.tolist(),
                loss=loss if _is_finite(torch.tensor(loss)) else None,
                origin=next(iter(origins), ""),
            )
        )
    for buffer, before in zip(context.running_statistics(), statistics, strict=True):
        buffer.copy_(before)
    return records


@contextmanager
def first_nonfinite(network: nn.Module) -> Iterator[list[str]]:
    """Yield a list of the modules whose outputs are not finite; it fills as they run."""
    names: list[str] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not _is_finite(output):
                names.append(name)

        return look

    # Modules without children: a parent would only repeat what its part has shown.
    handles = [
        module.register_forward_hook(hook(name))
        for name, module in network.named_modules()
        if not list(module.children())
    ]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(values: Tensor) -> bool:
    return not values.is_floating_point() or bool(values.isfinite().all())
