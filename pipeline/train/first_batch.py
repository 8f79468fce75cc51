"""A trial before the first step: everything that needs much memory, at full size, once.

Without it a stage could run out of memory hours later: when ``stored_columns: auto`` has decided,
or in the first evaluation. The trial leaves no trace in weights, optimizer and metrics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config import job_queries
from pipeline.data.loader import Batch
from pipeline.train.context import StageContext
from pipeline.train.step import TrainingStep


def try_full_batch(context: StageContext, step: TrainingStep, eval_batch: int) -> None:
    """Compute a micro-batch forward and backward, and the forward pass of an evaluation batch.

    Collective. ``eval_batch``: images per process.
    """
    config = context.config
    micro_batch, _ = job_queries.batches(config, context.dist_env.size)
    engine = step.context.engine
    engine.train()
    # With 'auto', the first pass measures a stored column and the second one decides.
    passes = 2 if context.job.model.stored_columns == "auto" else 1
    for _ in range(passes):
        step.rehearse(_grey_batch(micro_batch, config.image_size))
    # The largest batch of an evaluation: without gradients, but twice as many images.
    engine.eval()
    with torch.no_grad():
        size = config.image_size
        engine(torch.zeros(eval_batch, 3, size, size, device=context.device))


def _grey_batch(images: int, size: int) -> Batch:
    numbers: Tensor = torch.arange(images)
    return Batch(
        images=torch.full((images, size, size, 3), 128, dtype=torch.uint8),
        labels=torch.zeros(images, dtype=torch.int64),
        samples=numbers,
        views=numbers,
        positions=numbers,
        epoch=0,
        step=0,
    )
