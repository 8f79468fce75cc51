"""Sign of a mix of momentum and gradient, with decoupled weight decay (Chen et al., 2023).

Example of an optimizer. To add it, put this file into ``pipeline/optimizers/kinds/``. Nothing else
changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

KEYS = ("betas",)
MOMENTS = ("exp_avg",)


class Lion(torch.optim.Optimizer):
    """Every weight moves by the learning rate, plus its weight decay."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["exp_avg"] = torch.zeros_like(weight)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(state["exp_avg"].lerp(weight.grad, 1 - beta1).sign(), alpha=group["lr"])
                state["exp_avg"].lerp_(weight.grad, 1 - beta2)
        return loss


OPTIMIZER = Lion
