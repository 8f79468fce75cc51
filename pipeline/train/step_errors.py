"""Failures of a step that a setting of the job can cure, as errors that name the setting."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pipeline.config import job_queries
from pipeline.config.memory import GIB, stage_memory
from pipeline.errors import StageError
from pipeline.model.compiled_level import TooManyGraphs
from pipeline.runtime.device_memory import out_of_memory_named
from pipeline.train.context import StageContext
from pipeline.train.step import TrainingStep

# Steps without an update that end a stage: many in a row, or a whole epoch. In a short epoch, a few
# may be skipped by chance.
MOST_SKIPPED = 25
FEWEST_SKIPPED = 5


def require_progress(
    context: StageContext, done: int, step: TrainingStep, steps_per_epoch: int
) -> None:
    """Raise StageError if training has diverged: no step changes the weights any more.

    Args:
        done: steps so far.
        step: counts those that were skipped; on every rank the same ones.
    """
    skipped_in_a_row = step.skipped_in_a_row
    if skipped_in_a_row < min(MOST_SKIPPED, max(FEWEST_SKIPPED, steps_per_epoch)):
        return
    key = f"stages.{context.stage}.base_lr"
    first, reason = done - skipped_in_a_row + 1, step.skip_reason
    raise StageError(
        f"training has diverged: every step from {first} to {done} was skipped ({reason})",
        place=f"stages.{context.stage}",
        remedy=f"lower the learning rate (now {context.config.base_lr:g}) or lengthen the warm-up, "
        f"and start from scratch: --set {key}={context.config.base_lr / 10:g} --stage "
        f"{context.stage} --force",
    )


@contextlib.contextmanager
def settings_named(context: StageContext, when: str = "") -> Iterator[None]:
    """Turn exceptions of PyTorch, and of compiled levels, into errors for the user.

    Args:
        when: of the message, such as " before the first step".

    Raises:
        StageError: the device is out of memory, or the levels need too many compiled graphs.
    """
    micro_batch, _ = job_queries.batches(context.config, context.dist_env.size)
    key = f"stages.{context.stage}.micro_batch"
    divisors = [size for size in range(1, micro_batch) if micro_batch % size == 0]
    remedy = f"--set {key}={divisors[-1]}" if divisors else "a smaller image_size"
    if context.job.model.stored_columns:
        remedy += ", or --set model.stored_columns=0"
    estimate = _estimate(context, micro_batch)
    with out_of_memory_named(key, micro_batch, f"{remedy}; the same run resumes. {estimate}", when):
        try:
            yield
        except TooManyGraphs as error:
            raise StageError(
                str(error), place="model.compile", remedy="--set model.compile=false"
            ) from error


def _estimate(context: StageContext, micro_batch: int) -> str:
    """What the plan of the stage says about its memory."""
    stored = context.job.model.stored_columns
    memory = stage_memory(
        context.job.model,
        context.config,
        classes=context.num_classes,
        world_size=context.dist_env.size,
        stored=1 if stored == "auto" else stored,
    )
    return f"Estimate: {memory.needed(micro_batch) / GIB:.1f} GiB ({memory.in_words()})"
