"""The compound loss of intermediate supervision (RevCol, section 3.3; weights as published)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.model import Output

RECONSTRUCTION_WEIGHT = 3.0
CLASSIFICATION_WEIGHT = 0.7


@dataclass(kw_only=True)
class Loss:
    """A loss and its parts, on the device.

    ``total`` is the scalar to minimise and the sum of ``terms``. ``classification`` and
    ``reconstruction`` are unweighted, one scalar per supervised position.
    """

    total: Tensor
    classification: list[Tensor]
    reconstruction: list[Tensor]
    terms: list[Tensor]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy; ``targets`` are class indices (N,) or distributions (N, classes)."""
    return functional.cross_entropy(logits, targets)


def compound_terms(out: Output, images: Tensor | None, targets: Tensor) -> Loss:
    """Compute the compound loss and its parts.

    With four supervised positions i = 0 ... 3, of which the first three have a decoder::

        total = sum over i < 3 of  3.0 * (1 - i / 3) * BCE(reconstruction_i, image)
                                 + 0.7 * (i + 1) / 4 * CE(logits_i)
                + CE(logits_3)

    So early positions mainly reconstruct the image, late ones mainly classify it. A plain head has
    one position without a decoder, and the total is its cross entropy.

    Args:
        images: (N, 3, H, W) in [0, 1]; clamped to [0.01, 0.99] here. May be None if the network has
            no decoders.
        targets: class indices (N,) or distributions (N, classes).
    """
    classification = [cross_entropy(logits, targets) for logits in out.logits]
    reconstruction = []
    if out.reconstructions:
        assert images is not None
        # As published: only infinite logits would reach a target of exactly 0 or 1.
        pixels = images.clamp(0.01, 0.99)
        reconstruction = [
            functional.binary_cross_entropy_with_logits(logits.to(pixels.dtype), pixels)
            for logits in out.reconstructions
        ]
    # A plain head has no decoder: then only the last line adds a term.
    heads = len(classification)
    decoders = len(reconstruction)
    terms = [
        RECONSTRUCTION_WEIGHT * (1 - i / decoders) * reconstruction[i]
        + CLASSIFICATION_WEIGHT * (i + 1) / heads * classification[i]
        for i in range(decoders)
    ]
    terms.append(classification[-1])
    return Loss(
        total=torch.stack(terms).sum(),
        classification=classification,
        reconstruction=reconstruction,
        terms=terms,
    )


def compound_loss(out: Output, images: Tensor | None, targets: Tensor) -> Tensor:
    """The scalar to minimise of ``compound_terms``."""
    return compound_terms(out, images, targets).total
