"""Computes one step of a run again, on one process, and tells what a bad step is due to.

The order of the images and all random numbers are functions of seed, epoch and position, so a step
depends on the state before it only. The state is that of the bad step's capture, or of the newest
checkpoint before the step, from which the steps in between are computed again. One process plays
all ranks: it takes their micro-batches one after another and sums their gradients in that order.

    the step is in order here, but was bad         the arithmetic of the run was wrong
    weights are not finite, or another batch
    is bad with them too                           the weights
    only this batch is bad                         the data
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.checkpoint.manifest import Manifest, list_checkpoints
from pipeline.config import job_queries
from pipeline.config.schema import Job
from pipeline.data.device import DeviceBatch
from pipeline.data.job_dataset import open_job_dataset
from pipeline.data.loader import Batch, TrainLoader
from pipeline.data.network_inputs import batch_sheet, network_inputs
from pipeline.data.sheet import png
from pipeline.errors import CheckpointError, StageError
from pipeline.files import write_bytes
from pipeline.layout import RunDir
from pipeline.reporting import Log
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.process_group import process_group
from pipeline.train.capture import BadStep, MicroBatchRecord, examine, record_path
from pipeline.train.checkpointing import load_checkpoint
from pipeline.train.context import StageContext, StageLog
from pipeline.train.setup import build, continue_from, train_loader
from pipeline.train.step import TrainingStep
from pipeline.train.training_state import MetricsHistory, TrainingState
from pipeline.train.zero_state import ShardedState

HUGE = 1e4  # no weight of a network that trains is larger
_SHOWN = 4  # images named per micro-batch


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a replay has shown. ``cause``: data, weights, arithmetic, or none."""

    cause: str
    lines: list[str]


def replay(job: Job, stage: str, run_dir: RunDir, step: int, log: Log) -> Verdict:
    """Compute ``step`` (from 1) of a training stage again.

    Writes nothing but a contact sheet of the step's images, beside the captures.

    Raises:
        CheckpointError: no state before the step is left, or it is damaged.
    """
    directory = _state_before(run_dir, stage, step - 1)
    manifest = Manifest.read(directory)
    manifest.verify(directory)
    saved = TrainingState.from_json(manifest.state)
    job = _on_one_process(job, stage, saved.world_size)
    world = DistEnv()
    with process_group(world, job.cluster) as device:
        context = StageContext(
            job=job,
            stage=stage,
            config=job_queries.train_config(job, stage),
            run_dir=run_dir,
            dist_env=world,
            device=device,
            data=open_job_dataset(job, run_dir, stage, whole=False),
        )
        _, training = build(context, StageLog(is_main=False), with_best=False)
        load_checkpoint(directory, training.context.state)
        continue_from(saved, training, MetricsHistory())
        first = manifest.step
        log(f"replaying step {step} from {directory}, {step - 1 - first} steps before it")
        with train_loader(context, first + saved.guard.shift) as loader:
            training.context.engine.train()
            training.context.set_remainder_widths()
            for number in range(first, step - 1):
                training.run(number, loader)
            return _examine(context, training, loader, step - 1)


def _state_before(run_dir: RunDir, stage: str, done: int) -> Path:
    """The capture with ``done`` steps, else the newest checkpoint with at most so many."""
    captured = [path for steps, path in list_checkpoints(run_dir.captures(stage)) if steps == done]
    kept = [path for steps, path in list_checkpoints(run_dir.checkpoints(stage)) if steps <= done]
    if not captured and not kept:
        raise CheckpointError(
            f"no capture or checkpoint with at most {done} steps is left",
            place=str(run_dir.checkpoints(stage)),
            remedy="replay a later step; keep_checkpoints decides which checkpoints stay",
        )
    return (captured or kept)[0]


def _on_one_process(job: Job, stage: str, world_size: int) -> Job:
    """The job with the micro-batches of ``world_size`` processes on one."""
    config = job_queries.train_config(job, stage)
    micro_batch, _ = job_queries.batches(config, world_size)
    # ZeRO 1 accumulates gradients in the precision of the network, ZeRO 2 in fp32.
    zero_stage = 2 if config.zero_stage == 1 else config.zero_stage
    changed = config.model_copy(update={"micro_batch": micro_batch, "zero_stage": zero_stage})
    stages = job.stages.model_copy(update={stage: changed})
    return job.model_copy(update={"stages": stages})


def _examine(
    context: StageContext, training: TrainingStep, loader: TrainLoader, number: int
) -> Verdict:
    """Compute step ``number`` (0-based), and if it is bad, the same weights on other images."""
    # Without a record the step was in order for the run, or no captures were left to it.
    recorded = BadStep.read(record_path(context, number))
    data_step = number + training.context.guard.state.shift
    # 1. The weights before the step.
    lines = _suspicious_weights(training.context.state)
    # 2. Forward passes, module by module, with a picture; then the whole step.
    records = examine(training, loader, data_step)
    sheet = _draw(context, training, loader, data_step, records)
    is_bad = _is_bad(training, loader, number, data_step)
    reason = training.context.guard.reason
    lines += [line for record in records for line in _described(context, record)]
    lines.append(f"images of the step: {sheet}")
    if not is_bad:
        if recorded is None:
            return Verdict(cause="none", lines=["the step is in order", *lines])
        lines = [f"the run found: {recorded.reason}; here the step is in order", *lines]
        return Verdict(cause="arithmetic", lines=lines)
    # 3. Other images, with the same weights: a bad step was not applied.
    lines = [f"the step is bad here too: {reason}", *lines]
    if lines[1].startswith("weight") or _is_bad(training, loader, number, data_step + 1):
        return Verdict(cause="weights", lines=[*lines, "other images are bad with them too"])
    return Verdict(cause="data", lines=[*lines, "the images of the next step are in order"])


def _is_bad(training: TrainingStep, loader: TrainLoader, number: int, data_step: int) -> bool:
    """Whether the guard or the self-check objects to a step on the images of ``data_step``."""
    # The guard must judge both attempts by the same history.
    guard = training.context.guard
    before = replace(guard.state, bad_steps=list(guard.state.bad_steps))
    loader.rewind(data_step)
    try:
        training.run(number, loader)
    except StageError as error:  # the self-check failed again and again
        guard.reason = error.cause
        return True
    is_bad = bool(guard.reason)
    guard.state = before
    return is_bad


def _suspicious_weights(state: ShardedState) -> list[str]:
    """The weights that are not finite or far too large, one line each."""
    lines = []
    for fragment, kind, values in state.tensors():
        if kind != "master" or not values.numel():
            continue
        largest = float(values.detach().abs().max())
        if not largest <= HUGE:  # NaN too
            lines.append(f"weight {fragment.name}: largest value {largest:.4g}")
    return lines


def _described(context: StageContext, record: MicroBatchRecord) -> Sequence[str]:
    """A micro-batch that is not finite, with its origin and the places of its images."""
    if record.loss is not None and not record.origin:
        return []
    split = context.data.split("train")
    places = ", ".join(split.place(sample) for sample in record.samples[:_SHOWN])
    others = len(record.samples) - _SHOWN
    suffix = f" and {others} more" if others > 0 else ""
    return [
        f"first not finite: {record.origin or 'the loss'}; epoch {record.epoch + 1}, images: "
        f"{places}{suffix}"
    ]


def _draw(
    context: StageContext,
    training: TrainingStep,
    loader: TrainLoader,
    data_step: int,
    records: Sequence[MicroBatchRecord],
) -> Path:
    """Draw the first bad micro-batch, else the first one, as the network receives it."""
    bad = [index for index, record in enumerate(records) if record.loss is None or record.origin]
    batches = loader.rewind(data_step)
    for _ in range(bad[0] if bad else 0):
        next(batches)
    batch: Batch = next(batches).to(context.device)
    inputs: DeviceBatch = training.context.augment(batch)
    # Pixels that are not finite have no colour: black.
    inputs = replace(inputs, images=inputs.images.nan_to_num(0.0, 0.0, 0.0))
    shown = network_inputs(inputs, context.data.class_names, context.config.augment.smoothing)
    title = f"step {data_step + 1}: inputs of the network and their targets"
    path = context.run_dir.captures(context.stage) / f"replay-{data_step + 1:08d}.png"
    write_bytes(path, png(batch_sheet(shown, batch.samples.tolist(), title)))
    return path
