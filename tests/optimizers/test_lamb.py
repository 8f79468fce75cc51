"""LAMB against its definition, one parameter at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.optimizers.kinds.lamb import Lamb

BETA1, BETA2, EPS, RATE, DECAY = 0.9, 0.99, 1e-6, 0.02, 0.1


def reference(weight: Tensor, gradients: list[Tensor], adapt: bool, decay: float) -> Tensor:
    """Algorithm 2 of You et al. (ICLR 2020) with phi the identity."""
    mean = square = torch.zeros_like(weight)
    for number, gradient in enumerate(gradients, 1):
        mean = BETA1 * mean + (1 - BETA1) * gradient
        square = BETA2 * square + (1 - BETA2) * gradient**2
        corrected = (mean / (1 - BETA1**number), square / (1 - BETA2**number))
        update = corrected[0] / (corrected[1].sqrt() + EPS) + decay * weight
        ratio = float(weight.norm() / update.norm()) if adapt and weight.any() else 1.0
        weight = weight - RATE * ratio * update
    return weight


def test_steps_follow_the_definition() -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = [(8, 4), (6,), (3, 3)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    start[2].zero_()  # a weight of norm 0 takes Adam's step, or it would stay 0
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(5)]
    weights = [torch.nn.Parameter(value.clone()) for value in start]
    groups = [
        {"params": [weights[0], weights[2]], "weight_decay": DECAY},
        {"params": [weights[1]], "weight_decay": 0.0, "decayed": False},
    ]
    optimizer = Lamb(groups, lr=RATE, betas=(BETA1, BETA2), eps=EPS)
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient
        optimizer.step()
    for number, weight in enumerate(weights):
        adapt, decay = (False, 0.0) if number == 1 else (True, DECAY)
        expected = reference(start[number], [step[number] for step in gradients], adapt, decay)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_a_step_changes_a_parameter_by_the_share_lr_of_its_norm() -> None:
    for scale in (1e-3, 1.0, 1e3):
        weight = torch.nn.Parameter(scale * torch.ones(4, 4))
        before = weight.detach().clone()
        weight.grad = torch.full((4, 4), 1e-4)
        Lamb([weight], lr=0.01).step()
        share = (weight.detach() - before).norm() / before.norm()
        torch.testing.assert_close(share, torch.tensor(0.01), rtol=1e-4, atol=0)
