"""Metrics of an evaluation. Adding one is adding a function and its line in ``METRICS``.

Training's evaluations, the evaluate stage, TensorBoard (``accuracy/<name>``), run.json and the
table at the end of a run take their metrics from here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

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
METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {TOP1: top1, "top5": top5, LOSS: loss}
