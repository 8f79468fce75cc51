"""Stochastic gradient descent with momentum; weight decay is added to the gradient."""

from __future__ import annotations

import torch

KEYS = ("momentum", "nesterov")
# Stays zero with momentum 0, which saves no memory: a special case would not be worth its code.
MOMENTS = ("momentum_buffer",)
OPTIMIZER = torch.optim.SGD
