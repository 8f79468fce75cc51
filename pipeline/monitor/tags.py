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
MFU = "utilisation/mfu"
HFU = "utilisation/hfu"
RANK_SPREAD = "ranks/slowest_above_others"
SLOWEST_RANK = "ranks/slowest_rank"
RESTARTS = "goodput/restarts"
GOODPUT = "goodput/share"
RSS_MIB = "memory/rss_mib"
WEIGHTS_MIB = "memory/weights_mib"
OPTIMIZER_MIB = "memory/optimizer_mib"
STATE_MIB = "memory/state_mib"  # all tensors between two steps
PEAK_MIB = "memory/peak_mib"  # all tensors at the peak of a step
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


def goodput_part(part: str) -> str:
    """Share of a part in the time of the run."""
    return f"goodput_parts/{part}"


def group_rate(group: int) -> str:
    """Learning rate of a group of parameters under layer decay; 0 is the deepest in the network."""
    return f"layer_rates/group_{group}"


def gradient_norm(part: str) -> str:
    """Norm of the clipped gradient of a part: stem, column_0, ..., heads."""
    return f"gradient_norms/{part}"


def weight_norm(part: str) -> str:
    """Norm of the weights of a part."""
    return f"weight_norms/{part}"


def update_norm(part: str) -> str:
    """Norm of the last update of a part."""
    return f"update_norms/{part}"


def smallest_alpha(column: int) -> str:
    """Smallest |alpha| of a column."""
    return f"alpha/smallest_column_{column}"


def largest_alpha(column: int) -> str:
    """Largest |alpha| of a column."""
    return f"alpha/largest_column_{column}"


def headroom(column: int) -> str:
    """Bits between the largest value of a column's stream and the end of its range."""
    return f"headroom/column_{column}"


def of_stage(tag: str, stage: str) -> str:
    """The tag in TensorBoard: ``loss/total`` of finetune is ``loss_finetune/total`` there."""
    group, _, name = tag.partition("/")
    return f"loss_{stage}/{name}" if group == "loss" else tag
