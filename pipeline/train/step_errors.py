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
