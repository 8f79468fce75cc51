"""The compound loss of intermediate supervision (paper, section 3.3; weights as published)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.model import Output

RECONSTRUCTION_WEIGHT, CLASSIFICATION_WEIGHT = 3.0, 0.7


@dataclass
class Loss:
    """``total``: the scalar to minimise; the parts are unweighted, one a supervised position, on the device."""

    total: Tensor
    classification: list[Tensor]
    reconstruction: list[Tensor]
    terms: list[Tensor]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy; ``targets`` are class indices (N,) or distributions (N, classes)."""
    return functional.cross_entropy(logits, targets)


def compound_terms(out: Output, images: Tensor, targets: Tensor) -> Loss:
    """
    sum over i < 3 of 3.0 (1 - i/3) BCE(reconstruction_i, image) + 0.7 (i + 1)/4 CE(logits_i) plus CE(logits_last).

    Args:
        out: the network's output; one position (a plain head) gives the plain cross entropy.
        images: (N, 3, H, W) in [0, 1], clamped to [0.01, 0.99] here.
        targets: class indices (N,) or distributions (N, classes).
    """
    classification = [cross_entropy(logits, targets) for logits in out.logits]
    pixels = images.clamp(0.01, 0.99)
    reconstruction = [
        functional.binary_cross_entropy_with_logits(r.to(pixels.dtype), pixels)
        for r in out.reconstructions
    ]
    heads, decoders = len(classification), len(reconstruction)
    terms = [
        RECONSTRUCTION_WEIGHT * (1 - i / decoders) * reconstruction[i]
        + CLASSIFICATION_WEIGHT * (i + 1) / heads * classification[i]
        for i in range(decoders)
    ]
    terms.append(classification[-1])
    return Loss(torch.stack(terms).sum(), classification, reconstruction, terms)


def compound_loss(out: Output, images: Tensor, targets: Tensor) -> Tensor:
    """The scalar of ``compound_terms``."""
    return compound_terms(out, images, targets).total
