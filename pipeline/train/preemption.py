"""Agreement of all ranks to stop after the same step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class CollectiveStop:
    """Each step the ranks reduce their wishes on a group of their own; the result is read one step later, so nobody waits."""

    def __init__(self, wish: Callable[[], bool]) -> None:
        self._wish = wish
        self._group = dist.new_group(backend="gloo")
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: Any = None

    def after_step(self) -> bool:
        """Whether all ranks stop now. Call once a step on every rank."""
        decided = False
        if self._work is not None:
            self._work.wait()
            decided = bool(self._flag.item())
        self._flag = torch.tensor([int(self._wish())], dtype=torch.int32)
        self._work = dist.all_reduce(
            self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return decided

    def close(self) -> None:
        """Complete what is under way, so that the group can be left."""
        if self._work is not None:
            self._work.wait()
            self._work = None
