"""Adam with steps in proportion to each parameter's norm (You et al., ICLR 2020)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pipeline.optimizers.flat_layout import ParameterwiseOptimizer

KEYS = ("betas", "eps")
MOMENTS = ("exp_avg", "exp_avg_sq")


class Lamb(ParameterwiseOptimizer):
    """LAMB.

    A step moves a parameter by lr * trust ratio * update. The update is Adam's plus the weight
    decay; the trust ratio is |parameter| / |update|, or 1 if either is zero. So a step changes
    every parameter by the share lr of its norm. Example: weights of norm 8 and lr 0.01 give a step
    of norm 0.08, whatever the gradient.

    As usual, parameters without weight decay (1-D ones) have trust ratio 1. Groups tell them apart
    by their key ``decayed``. A layer scale that starts at 1e-6 could otherwise never grow.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"decayed": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all weights that have a gradient. Collective if ``layout`` is set."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = self._adam_update(weight, group)
                update.add_(weight, alpha=group["weight_decay"])
                if group["decayed"]:
                    self._apply_trust_ratios(weight, update)
                weight.add_(update, alpha=-group["lr"])
        return loss

    def _adam_update(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """mean / (sqrt(mean of squares) + eps), with bias correction."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())  # on the host: reading it waits for no device
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(weight)
        state["step"] += 1
        step = float(state["step"])
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(weight.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(weight.grad, weight.grad, value=1 - beta2)
        root = state["exp_avg_sq"].div(1 - beta2**step).sqrt_()
        return torch.div(state["exp_avg"], root.add_(group["eps"])).div_(1 - beta1**step)

    def _apply_trust_ratios(self, weight: Tensor, update: Tensor) -> None:
        """Multiply the update of each parameter in ``weight`` by its trust ratio."""
        if self.layout is None:
            updates = [update]
            norms = torch.stack([weight.norm(), update.norm()]).view(2, 1)
        else:
            updates = self.layout.ranges(weight, update)
            norms = self.layout.norms(weight, (weight, update))
        # ``where`` chooses on the device. Where a norm is zero, the quotient is not used.
        ratios = torch.where((norms > 0).all(0), norms[0] / norms[1], torch.ones_like(norms[0]))
        if updates:  # a rank may own nothing of a group
            torch._foreach_mul_(updates, list(ratios.unbind()))


OPTIMIZER = Lamb
