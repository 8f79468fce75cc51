"""Names of the metrics in event logs and TensorBoard.

The part before the slash groups the charts in TensorBoard. There, the losses of
each stage have a group of their own (`of_stage`): they differ too much in size for one chart.
"""

from __future__ import annotations

LOSS = "loss/total"
VALIDATION_LOSS = "loss/validation"
TRAIN_TOP1 = "accuracy/train_top1"
TOP1 = "accuracy/top1"
SELECTION_TOP1 = "selection/top1"
KEPT_STEP = "selection/kept_step"  # whose weights are the best so far
LEARNING_RATE = "optim/lr"
GRAD_NORM = "optim/grad_norm"
SKIPPED_STEPS = "optim/skipped_steps"
IMAGES_PER_S = "throughput/images_per_s"
DATA_WAIT_SHARE = "throughput/data_wait_share"
REPLACED_SAMPLES = "data/replaced_samples"
RSS_MIB = "memory/rss_mib"
DEVICE_MIB = "memory/device_mib"
MISMATCHED_ELEMENTS = "reversible/mismatched_elements"
RETRIED_STEPS = "reversible/retried_steps"
MAX_ABS = "reversible/max_abs"


def accuracy(metric: str) -> str:
    """A metric of an evaluation, such as top1."""
    return f"accuracy/{metric}"


def classification_loss(position: int) -> str:
    """Cross entropy at one supervised position."""
    return f"loss/position_{position}/classification"


def reconstruction_loss(position: int) -> str:
    """Reconstruction loss at one supervised position."""
    return f"loss/position_{position}/reconstruction"


def of_stage(tag: str, stage: str) -> str:
    """The tag in TensorBoard: ``loss/total`` of finetune is ``loss_finetune/total`` there."""
    group, _, name = tag.partition("/")
    return f"loss_{stage}/{name}" if group == "loss" else tag
