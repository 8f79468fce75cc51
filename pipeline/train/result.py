"""The result of a training stage: complete fp32 weights from its last checkpoint, and metrics."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist

from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.manifest import Manifest, directory_of
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.weights_file import write_weights_file
from pipeline.checkpoint.writer import WRITE_ERRORS
from pipeline.config import job_queries
from pipeline.errors import CheckpointError
from pipeline.evaluate.metrics import COMPARED, LOSS
from pipeline.layout import WEIGHTS_FILE
from pipeline.model import NetworkSpec
from pipeline.train.context import StageContext, StageLog
from pipeline.train.setup import StageSetup
from pipeline.train.zero_state import BEST


def write_result(context: StageContext, setup: StageSetup, log: StageLog) -> dict[str, float]:
    """Write the stage's weights, from its last checkpoint, and return its metrics. Collective."""
    config = context.config
    evaluations = setup.history.evaluations
    selection = setup.selection
    evaluation = evaluations[-1] if selection is None else selection.best(evaluations)
    step = context.total_steps if selection is None else int(evaluation["step"])
    # "loss" stays that of training: the evaluation's is in the event log.
    metrics = {
        **setup.history.last_metrics,
        **{name: value for name, value in evaluation.items() if name not in ("step", LOSS)},
        "steps": float(context.total_steps),
    }
    if selection is not None:
        metrics["kept_step"] = float(step)
        log(
            f"kept the weights of step {step}: top-1 {evaluation[selection.metric]:.1%} on the "
            f"{selection.split} split, the best of {len(evaluations)} evaluations"
        )
    description = WeightsDescription(
        classes=context.data.classes,
        image_size=config.image_size,
        preprocessing=config.preprocessing,
        precision=config.precision,
        data=context.data.fingerprint,
        metrics=metrics,
        step=step,
        keep=config.keep if selection is not None else "last",
        selection_split=selection.split if selection is not None else None,
    )
    checkpoint = directory_of(context.checkpoints, context.total_steps)
    _write_on_rank_0(context.run_dir.stage(context.stage), checkpoint, setup.spec, description)
    if log.recorder is not None:
        log.recorder.hparams(job_queries.hyperparameters(context.job, context.stage), COMPARED)
    return metrics


def _write_on_rank_0(
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
    # Later stages and users would start from them; the steps since then were all skipped.
    for name, values in tensors.items():
        if not bool(values.isfinite().all()):
            raise CheckpointError(
                f"weight {name} is not finite: the training has diverged",
                place=str(checkpoint),
                remedy="lower base_lr, then rerun the same command with "
                f"--stage {checkpoint.parent.name} --force",
            )
    write_weights_file(directory / WEIGHTS_FILE, tensors)
    replace(description, network=asdict(spec), weights=kind).write(directory)
