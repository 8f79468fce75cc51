"""Metrics of an evaluation. Adding one is adding a function and its line in ``METRICS``.

Training's evaluations, the evaluate stage, TensorBoard (``accuracy/<name>``), run.json and the
table at the end of a run take their metrics from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional

from pipeline.monitor import tags

Metric = Callable[[Tensor, Tensor], Tensor]
LOSS = "loss"
TOP1 = "top1"


def _top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1).sum()


def top1(logits: Tensor, labels: Tensor) -> Tensor:
    """Images whose best class is right."""
    return _top(logits, labels, 1)


def top5(logits: Tensor, labels: Tensor) -> Tensor:
    """Images whose class is among the best five."""
    return _top(logits, labels, 5)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, summed over the images."""
    return functional.cross_entropy(logits, labels).double() * len(labels)


# Name -> sum over a batch, from logits (N, classes) and labels (N,): a scalar on their device. The
# mean over all images of the split is reported.
METRICS: dict[str, Metric] = {TOP1: top1, "top5": top5, LOSS: loss}
# Fewest classes that a metric says something about. Of six classes, a guess has five right in six.
FEWEST_CLASSES = {"top5": 11}


def metrics_of(classes: int) -> dict[str, Metric]:
    """The metrics that are reported for this number of classes."""
    return {name: use for name, use in METRICS.items() if classes >= FEWEST_CLASSES.get(name, 1)}


def tagged(split: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of an evaluation on ``split`` by tag, for the event log and TensorBoard."""
    return {_tag(split, name): value for name, value in metrics.items()}


def _tag(split: str, name: str) -> str:
    if name == LOSS:
        return f"loss/{split}"
    # The curves of training are those of the validation split and have no prefix.
    return tags.accuracy(name if split == "validation" else f"{split}_{name}")


# The columns of TensorBoard's HParams: losses of training, and the metrics of the evaluate stage.
COMPARED = [
    *(
        tags.of_stage(tag, stage)
        for stage in ("pretrain", "finetune")
        for tag in (tags.LOSS, tags.VALIDATION_LOSS)
    ),
    *(
        tags.of_stage(_tag(split, name), "evaluate")
        for split in ("validation", "test")
        for name in METRICS
    ),
]
