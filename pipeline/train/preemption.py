"""Stopping on request: all ranks agree to stop after the same step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist


class CollectiveStop:
    """Combines the stop requests of all ranks, without waiting for them.

    A stop request (a signal, for example) reaches the ranks at different moments, but all must
    write the same checkpoint. So after every step the ranks start a reduction of their requests, on
    a process group of its own. They read the result after the next step, when it is complete.

    Example: rank 1 receives a request during step 6. ``after_step`` starts the reduction after
    step 6 and returns True on every rank after step 7.

    Args:
        stop_requested: asked once per step on every rank.
    """

    def __init__(self, stop_requested: Callable[[], bool]) -> None:
        self._stop_requested = stop_requested
        self._group = dist.new_group(backend="gloo")
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._reduction: dist.Work | None = None

    def after_step(self) -> bool:
        """True on every rank if the ranks stop now. Call it once per step on every rank."""
        # 1. Read the result of the previous step. After a step it is complete: no waiting.
        stop_now = False
        if self._reduction is not None:
            self._reduction.wait()
            stop_now = bool(self._flag.item())
        # 2. Start the reduction of this step's requests; the next call reads it.
        self._flag = torch.tensor([int(self._stop_requested())], dtype=torch.int32)
        self._reduction = dist.all_reduce(
            self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return stop_now

    def close(self) -> None:
        """Complete the pending reduction, so that the process group can be destroyed."""
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None
