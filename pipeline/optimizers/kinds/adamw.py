"""Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019)."""

from __future__ import annotations

import torch

KEYS = ("betas", "eps")
MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZER = torch.optim.AdamW
